"""What the timetable must do, said a second time: plain Python from the timetable's rules, without a server.

The place of a login is never stored here but worked out whenever it is asked for, which is what `place()` in the
scripts has to amount to. Times are UTC milliseconds; `now_ms` is set by whoever drives the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from worker import schedule
from worker.accounts import Accounts, Definition
from worker.timetable import Token

MARGIN_MS = 60_000
DEADLINE_MS = 190_000
DAY_MS = 86_400_000
LIFE_SPAN_MS, GRACE_MS, HOLD_MS = 30 * 60_000, 10 * 60_000, 10 * 60_000
AGAIN_MS = 60_000
PAUSE_LOOK_MS = 60_000
MOST_BODIES = 4
BEGUN = {"polling", "awaiting"}
DEAD = {"suspended", "parked"}
WAITS = {"scheduled", "waiting", "dispatched"}


@dataclass
class Account:
    definition: Definition
    state: str = "scheduled"
    due_ms: int = 0
    slot_ms: int = 0
    generation: int = 1
    is_paused: bool = False
    poll: int = 0
    attempt: int = 0
    counters: tuple[int, int, int] = (0, 0, 0)
    caller: str = ""
    was_woken: bool | None = None  #: None: never begun
    is_answered: bool = False
    latest: tuple[int, int] = (0, 0)
    amount: str = ""
    interval_ms: int = 0
    overdue_at_ms: int | None = None  #: None: it is not looked at any more
    is_overdue: bool = False
    is_told: bool = False
    begun_ms: int | None = None

    @property
    def alias(self) -> str:
        return self.definition.alias

    @property
    def login(self) -> str:
        return self.definition.login

    @property
    def token(self) -> Token:
        return Token(self.login, self.alias, self.poll, self.attempt)

    def is_at(self, token: Token, *states: str) -> bool:
        return self.token == token and self.state in states

    def start_over(self, due_ms: int, now_ms: int) -> None:
        self.counters = (0, 0, 0)
        self.schedule(due_ms, now_ms)

    def schedule(self, due_ms: int, now_ms: int) -> None:
        """No sooner than its gap after its last begin."""
        self.step("scheduled", max(due_ms, self.gap_end_ms(now_ms)), now_ms)

    def gap_end_ms(self, now_ms: int) -> int:
        gap_ms = self.definition.min_gap_ms
        return min(self.begun_ms, now_ms) + gap_ms if gap_ms and self.begun_ms is not None else 0

    def step(self, state: str, due_ms: int, now_ms: int) -> None:
        self.state, self.due_ms = state, due_ms
        self.watch(now_ms)

    def watch(self, now_ms: int) -> None:
        """It is overdue an interval after its due time, or after what kept it from being polled then."""
        self.is_overdue, self.overdue_at_ms = False, max(self.due_ms, now_ms) + self.interval_ms

    def unwatch(self) -> None:
        self.is_overdue, self.overdue_at_ms = False, None

    def void(self, now_ms: int) -> None:
        """A token that nobody has begun: the account stands where it stood before the claim."""
        if self.state == "dispatched" and self.attempt == 1:
            self.schedule(self.due_ms, now_ms)
        elif self.state == "dispatched":
            self.step("waiting", self.due_ms, now_ms)


@dataclass
class Login:
    holder: Token | None = None
    until_ms: int = 0
    is_begun: bool = False
    refusals: int = 0
    refused_by: str = ""
    blocked: str = ""
    code: str = ""
    fingerprint: str = ""
    is_manual: bool = False
    is_probing: bool = False
    probe: str = ""
    accepted: dict[str, str] = field(default_factory=dict)
    to_forgive: dict[str, str] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    not_before_ms: int = 0  #: while everything is paused

    def hold(self, token: Token, until_ms: int) -> None:
        self.holder, self.until_ms = token, until_ms

    def free(self, token: Token) -> None:
        if self.holder == token:
            self.holder, self.is_begun, self.refusals, self.refused_by = None, False, 0, ""


@dataclass
class Model:
    now_ms: int
    threads: int = 100
    is_paused: bool = False
    accounts: dict[str, Account] = field(default_factory=dict)
    logins: dict[str, Login] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    queue: list[Token] = field(default_factory=list)
    pins: dict[tuple[str, int], set[str]] = field(default_factory=dict)
    operations: dict[str, str] = field(default_factory=dict)
    callbacks: dict[Token, set[str]] = field(default_factory=dict)  #: tokens that may be called back: bodies taken in
    answers: dict[Token, int] = field(default_factory=dict)
    bodies: dict[Token, list[str]] = field(default_factory=dict)
    settlings: list[Token] = field(default_factory=list)
    events: list[tuple[str, ...]] = field(default_factory=list)

    # ------------------------------------------------------------------------------------------------ what stands

    def of(self, login: str) -> list[Account]:
        """The login's accounts that are defined now."""
        return [a for a in self.accounts.values() if a.login == login and a.state != "retired"]

    def next_account(self, name: str) -> Account | None:
        login = self.logins[name]
        ready = [a for a in self.of(name) if self.is_planned(a) and not a.is_paused]
        if login.is_probing:
            tried = [account for account in ready if account.alias == login.probe]
            ready = tried or [account for account in ready if account.state != "awaiting"] or ready
        return min(ready, key=lambda account: (account.due_ms, account.alias), default=None)

    def is_planned(self, account: Account) -> bool:
        """Whether it has a due time of its own: at its deadline, too, once its place is free and no answer is there."""
        is_held = self.logins[account.login].holder == account.token
        is_left = account.state == "awaiting" and not account.is_answered and not is_held
        return account.state in {"scheduled", "waiting"} or is_left

    def place(self, name: str) -> int | None:
        """When the login's next step is, None for never."""
        login = self.logins[name]
        if login.blocked:
            return None
        if login.holder:
            return login.until_ms
        account = self.next_account(name)
        if account is None or account.state == "awaiting":
            return account.due_ms if account else None
        return max(account.due_ms, login.not_before_ms)

    def _account(self, token: Token) -> Account | None:
        return self.accounts.get(token.account)

    def is_at(self, token: Token, *states: str) -> bool:
        account = self._account(token)
        return account is not None and account.is_at(token, *states)

    # ------------------------------------------------------------------------------------------------ definitions

    def apply(self, accounts: Accounts) -> None:
        for definition in accounts.definitions.values():
            self._define(definition)
        for alias, account in self.accounts.items():
            if alias not in accounts.definitions and account.state != "retired":
                account.state, account.is_paused, account.latest, account.amount = "retired", False, (0, 0), ""
                account.is_told = False
                account.unwatch()

    def _define(self, definition: Definition) -> None:
        self.logins.setdefault(definition.login, Login())
        slot_ms = schedule.next_slot_ms(definition, self.now_ms)
        account = self.accounts.get(definition.alias)
        interval_ms = schedule.interval_ms(definition, slot_ms)
        if account is None:
            account = Account(definition, slot_ms=slot_ms, interval_ms=interval_ms)
            account.start_over(slot_ms, self.now_ms)
            self.accounts[definition.alias] = account
            return
        old, account.definition = account.definition, definition
        if account.state != "retired" and old == definition:
            return
        old_gap_ms = old.min_gap_ms if account.state != "retired" else definition.min_gap_ms
        account.slot_ms, account.interval_ms = slot_ms, interval_ms
        if old.identity != definition.identity:
            account.generation += 1
            account.latest, account.amount = (0, 0), ""
        if old.identity != definition.identity or account.state == "retired":
            account.start_over(slot_ms, self.now_ms)
        elif account.state == "scheduled" and old.every_ms != definition.every_ms:
            account.schedule(slot_ms, self.now_ms)
        elif account.state == "scheduled" and old_gap_ms != definition.min_gap_ms:
            account.schedule(account.due_ms, self.now_ms)

    # ------------------------------------------------------------------------------------------------ claim, begin

    def claim(self) -> tuple[int, int, list[Token]]:
        """(dispatched, sent again, lapsed), the earliest place first."""
        room = self.threads - len(self.queue)
        dispatched, resent, lapsed = 0, 0, []
        places = [(place, name) for name in self.logins if (place := self.place(name)) is not None]
        for _, name in sorted(each for each in places if each[0] <= self.now_ms):
            login = self.logins[name]
            if login.holder:
                if self.is_at(login.holder, "dispatched"):
                    if room > 0:
                        room, resent = room - 1, resent + 1
                        self._send(login, login.holder)
                    continue
                if self.is_at(login.holder, "polling") and not self.accounts[login.holder.account].is_answered:
                    lapsed.append(login.holder)
                    continue
                if self.is_at(login.holder, "awaiting") and not self.accounts[login.holder.account].is_answered:
                    self.accounts[login.holder.account].watch(self.now_ms)
                login.free(login.holder)
            account = self.next_account(name)
            if account and account.due_ms <= self.now_ms and account.state == "awaiting":
                lapsed.append(account.token)
            elif account and account.due_ms <= self.now_ms and room > 0 and self.is_paused:
                login.not_before_ms = self.now_ms + PAUSE_LOOK_MS
            elif account and account.due_ms <= self.now_ms and room > 0:
                login.not_before_ms = 0
                room, dispatched = room - 1, dispatched + 1
                if account.state == "scheduled":
                    account.poll, account.attempt = max(account.poll + 1, self.now_ms), 1
                else:
                    account.attempt += 1
                account.state, account.is_answered = "dispatched", False
                if login.is_probing:
                    login.probe = account.alias
                self._send(login, account.token)
        lost = len(self.answers) - len(self.settlings)
        overdue = sorted((at, *token.args[1:], token) for token, at in self.answers.items() if at <= self.now_ms)
        for *_, token in overdue[: max(0, lost)]:
            self._announce(token)
        return dispatched, resent, lapsed

    def _announce(self, token: Token) -> None:
        self.settlings.append(token)
        self.answers[token] = self.now_ms + AGAIN_MS

    def _send(self, login: Login, token: Token) -> None:
        login.hold(token, self.now_ms + MARGIN_MS)
        self.queue.append(token)

    def begin(self, token: Token, caller: str, bank: str, key: str) -> str:
        login, account = self.logins[token.login], self._account(token)
        if account is None or not account.is_at(token, "dispatched"):
            is_repeated = login.holder == token and account is not None and account.caller == caller
            if account and is_repeated and account.is_at(token, "polling") and not login.blocked:
                return "begun"
            if not login.is_begun:
                login.free(token)
            return "stale"
        if {key, bank} & self.failed:
            if login.refused_by != caller:
                login.refusals, login.refused_by = login.refusals + 1, caller
                login.until_ms = self.now_ms + MARGIN_MS
            return f"refused {'key' if key in self.failed else 'bank'} {login.refusals}"
        account.state, account.caller, account.was_woken = "polling", caller, False
        account.unwatch()
        account.begun_ms = self.now_ms
        login.accepted = {"bank": bank, "key": key}
        login.is_begun, login.refusals, login.refused_by = True, 0, ""
        login.until_ms = self.now_ms + DEADLINE_MS + MARGIN_MS
        if account.definition.mode == "callback":
            self.callbacks.setdefault(token, set())
        return "begun"

    # ------------------------------------------------------------------------------------------------ callbacks

    def accept(self, token: Token, promised_ms: int | None) -> int | None:
        account, login = self._account(token), self.logins[token.login]
        if account and account.is_at(token, "awaiting"):
            return account.due_ms
        if account is None or not account.is_at(token, "polling"):
            return None
        life_span_ms = LIFE_SPAN_MS if promised_ms is None else promised_ms - self.now_ms
        account.state = "awaiting"
        account.due_ms = self.now_ms + max(0, min(life_span_ms, 2 * DAY_MS)) + GRACE_MS
        if login.holder == token:
            login.until_ms = min(self.now_ms + HOLD_MS, account.due_ms)
        return account.due_ms

    def receive(self, token: Token, body: str) -> str:
        if token not in self.callbacks:
            return "unknown"
        if body in self.callbacks[token]:
            return "repeated"
        if len(self.callbacks[token]) >= MOST_BODIES:
            return "full"
        self.callbacks[token].add(body)
        self.bodies.setdefault(token, []).append(body)
        self._announce(token)
        if self.is_at(token, *BEGUN):
            self.accounts[token.account].is_answered = True
        return "stored"

    def forget(self, token: Token, body: str) -> None:
        if body in self.bodies.get(token, []):
            self.bodies[token].remove(body)
        if not self.bodies.get(token):
            self.answers.pop(token, None)
            self.bodies.pop(token, None)

    def _decides(self, token: Token, is_answer: bool) -> bool:
        """Whether the end of this attempt moves its account: once there is an answer, only the answer does."""
        account = self._account(token)
        return account is not None and account.is_at(token, *BEGUN) and (is_answer or not account.is_answered)

    # ------------------------------------------------------------------------------------------------ a poll's end

    def settle(
        self,
        token: Token,
        generation: int,
        definition: Definition,
        operation: str,
        ids: tuple[str, ...],
        amount: str,
        fetched_at_ms: int,
    ) -> str:
        account, pins = self._account(token), self.pins.setdefault((token.account, generation), set())
        assert account is not None
        is_others = self.operations.get(operation, token.account) != token.account
        if is_others or (pins and not pins.issuperset(ids)):
            return "foreign"
        is_defined = account.state != "retired" and account.generation == generation
        is_current = is_defined and account.is_at(token, *BEGUN)
        result = "repeated"
        if operation not in self.operations:
            self.operations[operation] = token.account
            pins.update(ids)
            is_newer = is_defined and (token.poll, token.attempt) > account.latest
            is_changed = is_newer and account.amount != amount
            if is_newer:
                account.latest, account.amount = (token.poll, token.attempt), amount
            self.events.append(("balance", operation, token.account, str(not is_current), str(is_changed)))
            result = "published" if is_current else "late"
        if is_current:
            assert account.begun_ms is not None
            next_ms = schedule.next_slot_ms(
                definition, max(fetched_at_ms, account.begun_ms + definition.min_gap_ms - 1)
            )
            if definition == account.definition:
                account.interval_ms = schedule.interval_ms(definition, next_ms)
            account.start_over(next_ms if definition == account.definition else account.slot_ms, self.now_ms)
            self.logins[token.login].is_probing = False
            if account.is_told:
                self._say(account, "resumed", "answer")
        self._end(token)
        return result

    def _end(self, token: Token) -> None:
        if not self.is_at(token, "dispatched"):
            self.logins[token.login].free(token)

    def postpone(
        self, token: Token, countdown_ms: int, counters: tuple[int, int, int], *, is_answer: bool = False
    ) -> str:
        account = self._account(token)
        if account and account.is_at(token, "waiting"):
            return f"postponed {account.due_ms}"
        result = "stale"
        if account and self._decides(token, is_answer):
            account.step("waiting", self.now_ms + countdown_ms, self.now_ms)
            account.counters = counters
            result = f"postponed {account.due_ms}"
        self._end(token)
        return result

    def suspend(self, token: Token, state: str, short_ms: int, *, is_answer: bool = False) -> str:
        account, result = self._account(token), "stale"
        if account and account.is_at(token, state):
            result = state
        elif account and state == "parked" and account.was_woken and account.is_at(token, "waiting"):
            result = f"postponed {account.due_ms}"
        elif account and state == "parked" and account.was_woken and self._decides(token, is_answer):
            result = self._wait_shortly(account, short_ms)
        elif account and self._decides(token, is_answer):
            account.state = result = state
            self._say(account, "suspended", state)
        self._end(token)
        return result

    def _wait_shortly(self, account: Account, short_ms: int) -> str:
        if account.state != "waiting":
            account.step("waiting", self.now_ms + short_ms, self.now_ms)
        return f"postponed {account.due_ms}"

    def block(self, token: Token, kind: str, fingerprint: str, code: str, short_ms: int, *, refused: bool) -> str:
        login, account = self.logins[token.login], self._account(token)
        accepted = login.accepted.get(kind)
        is_replaced = bool(fingerprint and accepted is not None and accepted != fingerprint and not refused)
        if fingerprint:
            self.failed.add(fingerprint)
            if kind == "bank" and not refused:
                login.failures[fingerprint] = self.now_ms
        if not is_replaced:
            self._block(login, token, kind, fingerprint, code)
            result = "blocked"
        elif account and account.is_at(token, "waiting", *BEGUN):
            result = self._wait_shortly(account, short_ms)
        else:
            result = "stale"
        recent = [at for at in login.failures.values() if at >= self.now_ms - DAY_MS]
        if kind == "bank" and login.blocked == "bank" and (not fingerprint or len(recent) >= 2):
            login.is_manual = True
        self._end(token)
        return result

    def _block(self, login: Login, token: Token, kind: str, fingerprint: str, code: str) -> None:
        account = self._account(token)
        if account and account.is_at(token, *BEGUN):
            account.start_over(self.now_ms, self.now_ms)
        if fingerprint:
            login.to_forgive[kind] = fingerprint
        was_blocked = login.blocked
        if not was_blocked or (was_blocked, kind) == ("key", "bank"):
            login.blocked, login.fingerprint, login.code = kind, fingerprint, code
            login.is_probing, login.probe = False, ""
        if not was_blocked:
            if login.holder and (holding := self._account(login.holder)) and holding.login == token.login:
                holding.void(self.now_ms)
            for each in self.of(token.login):
                each.unwatch()
            self._tell(token.login, "suspended", "blocked")

    def _tell(self, login: str, what: str, why: str) -> None:
        for account in self.of(login):
            if account.state not in DEAD:
                self._say(account, what, why)

    def _say(self, account: Account, what: str, why: str) -> None:
        self.events.append((what, account.alias, why))
        account.is_told = what == "overdue"

    def tell_overdue(self) -> list[str]:
        """Those whose time is over and that may be polled are overdue; the ledger hears once of each spell."""
        told: list[str] = []
        if self.is_paused:
            return told
        for account in sorted(self.accounts.values(), key=lambda account: (account.overdue_at_ms or 0, account.alias)):
            if account.overdue_at_ms is None or account.overdue_at_ms > self.now_ms:
                continue
            account.overdue_at_ms = None
            if account.is_paused or self.logins[account.login].blocked or account.state not in WAITS:
                continue
            account.is_overdue = True
            if not account.is_told:
                self._say(account, "overdue", str(account.due_ms))
                told.append(account.alias)
        return told

    # ------------------------------------------------------------------------------------------------ operators

    def _refusal(self, alias: str, *allowed: str) -> str | None:
        state = self.accounts[alias].state if alias in self.accounts else "unknown"
        return None if state in allowed else state

    def poll(self, alias: str) -> str | None:
        if refusal := self._refusal(alias, "scheduled"):
            return refusal
        account = self.accounts[alias]
        if self.is_paused:
            return "everything paused"
        if account.is_paused or self.logins[account.login].blocked:
            return "paused" if account.is_paused else "blocked"
        if account.gap_end_ms(self.now_ms) > self.now_ms:
            return "gap"
        account.schedule(self.now_ms, self.now_ms)
        return None

    def pause_all(self) -> None:
        self.is_paused = True
        for name, login in self.logins.items():
            if login.holder and (holding := self._account(login.holder)) and holding.login == name:
                holding.void(self.now_ms)
        for account in self.accounts.values():
            if account.is_overdue:
                account.is_overdue, account.overdue_at_ms = False, self.now_ms

    def resume_all(self) -> bool:
        was_paused, self.is_paused = self.is_paused, False
        for account in self.accounts.values():
            if was_paused and account.overdue_at_ms is not None and account.overdue_at_ms <= self.now_ms:
                account.watch(self.now_ms)
        for login in self.logins.values():
            login.not_before_ms = 0 if was_paused else login.not_before_ms
        return was_paused

    def pause(self, alias: str) -> str | None:
        refusal = self._refusal(alias, "scheduled", "dispatched", "waiting", *BEGUN, *DEAD)
        if refusal is None and not self.accounts[alias].is_paused:
            self.accounts[alias].void(self.now_ms)
            self.accounts[alias].is_paused = True
            self.accounts[alias].unwatch()
        return refusal

    def resume(self, alias: str) -> str | None:
        account = self.accounts.get(alias)
        if account and self.is_paused:
            return "everything paused"
        if account and account.is_paused:
            account.is_paused = False
            if self.is_planned(account) and account.state == "scheduled":
                account.schedule(account.due_ms, self.now_ms)
            elif self.is_planned(account):
                account.watch(self.now_ms)
            return None
        return self._refusal(alias)

    def redrive(self, alias: str) -> str | None:
        refusal = self._refusal(alias, "suspended")
        if refusal is None:
            self._bring_back(self.accounts[alias], self.now_ms, "redrive")
        return refusal

    def _bring_back(self, account: Account, due_ms: int, by: str) -> None:
        account.start_over(due_ms, self.now_ms)
        if not self.logins[account.login].blocked:
            self._say(account, "resumed", by)

    def discard(self, alias: str) -> str | None:
        refusal = self._refusal(alias, *DEAD)
        if refusal is None:
            self.accounts[alias].start_over(self.now_ms, self.now_ms)
            self.accounts[alias].is_paused = True
        return refusal

    def release(self, aliases: list[str], institution: str, login: str, spread_ms: int) -> list[str]:
        released: list[str] = []
        for alias in aliases or sorted(self.accounts):
            account = self.accounts.get(alias)
            if account is None or (aliases and account.state == "retired"):
                continue
            if institution not in {"", account.definition.institution} or login not in {"", account.login}:
                continue
            account.was_woken = None if account.was_woken is None else True
            if account.state == "parked":
                self._bring_back(account, self.now_ms + len(released) * spread_ms, "release")
                released.append(alias)
        return released

    def unblock(self, name: str, by: str, fingerprint: str) -> str | None:
        login = self.logins[name]
        if refusal := self._why_blocked(login, by, fingerprint):
            return refusal
        if by == "operator":
            for failed in login.to_forgive.values():
                self.failed.discard(failed)
                login.failures.pop(failed, None)
        else:
            login.accepted[by] = fingerprint
        login.blocked, login.fingerprint, login.is_manual, login.to_forgive = "", "", False, {}
        login.is_probing = True
        for account in self.of(name):
            if account.state in WAITS:
                account.watch(self.now_ms)
        self._tell(name, "resumed", "unblock" if by == "operator" else "new credential")
        return None

    def _why_blocked(self, login: Login, by: str, fingerprint: str) -> str | None:
        if not login.blocked:
            return "not blocked"
        if by == "operator":
            return None
        if login.is_manual:
            return "only an operator may unblock"
        if by != login.blocked:
            return "the other credential failed"
        return "it failed" if fingerprint in self.failed | {"", login.fingerprint} else None
