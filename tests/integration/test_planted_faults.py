"""Every promise of the scripts has a test that can fail: plant the fault, and see the named test go red.

The state machine finds half of them by itself: some at once, here; the others with `BALANCES_TEST_LONG=1`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import redis
import test_audit as trail
import test_backlog as backlog
import test_breaker as breakers
import test_callbacks as callbacks
import test_clock_jumps as clock
import test_counts as counts
import test_interplay as interplay
import test_limits as limits
import test_overdue as overdue
import test_purge as remains
import test_rest as rests
import test_timetable as rules
import test_version as versions
from planted_faults import Patch, patched
from servers import ValkeyServer
from test_machine import IS_LONG, profile, run
from world import World, read

from worker import ops
from worker.policy import Credential

Check = Callable[[World], object]


@dataclass(frozen=True)
class Fault:
    """What somebody might have written, and the test that tells. `found`: the state machine finds it, too."""

    name: str
    script: str
    old: str
    new: str
    check: Check
    found: bool = True

    @property
    def patch(self) -> Patch:
        return Patch(self.script, self.old, self.new)


FAULTS = [
    # ------------------------------------------------------------------------------------------------------ apply
    Fault(
        "apply begins a waiting account anew",
        "apply",
        "if is_new or is_other then\n",
        "if is_new or is_other or a.state == 'waiting' then\n",
        partial(rules.test_nothing_shortens_a_wait, event="another interval"),
    ),
    Fault(
        "apply frees the place of what it removes",
        "apply",
        "local function take_off(alias, login)\n",
        "local function take_off(alias, login)\n  redis.call('HDEL', 'login:' .. login, 'holder', 'until', 'begun')\n",
        partial(
            rules.test_what_happens_to_an_account_in_flight_does_not_free_its_place, change="removed", is_begun=True
        ),
    ),
    Fault(
        "apply keeps the pins of another identity",
        "apply",
        "d.identity == a.identity and a.generation or whole((a.generation or 0) + 1)",
        "a.generation or '1'",
        partial(
            rules.test_an_older_generations_answer_is_checked_against_its_own_pins_and_published_late,
            change="another number",
        ),
    ),
    Fault(
        "apply leaves the letter of what it removes",
        "apply",
        "  remove_letter(alias)\n",
        "",
        rules.test_retiring_takes_the_letter_and_what_would_be_polled,
    ),
    Fault(
        "apply does not look whether it was overtaken",
        "apply",
        "if at ~= serial then",
        "if false then",
        rules.test_an_apply_that_was_overtaken_compares_again,
        found=False,
    ),
    Fault(
        "apply forgets the numbers of polls",
        "apply",
        "redis.call('HSETNX', 'account:' .. alias, 'poll', 0)",
        "redis.call('HSET', 'account:' .. alias, 'poll', 0)",
        rules.test_a_re_added_account_keeps_generation_and_pins_and_goes_on_counting_polls,
    ),
    # ------------------------------------------------------------------------------------------------------ claim
    Fault(
        "claim looks at the same logins each time",
        "claim",
        "tonumber(redis.call('HGET', 'config', 'looked')) or 0",
        "0",
        backlog.test_without_room_every_lapse_is_found_all_the_same,
        found=False,
    ),
    Fault(
        "claim serves logins out of turn",
        "claim",
        "  room = 0\n",
        "",
        backlog.test_room_that_the_oldest_do_not_use_is_not_for_those_far_behind_them,
        found=False,
    ),
    Fault(
        "claim does not look at the clock",
        "claim",
        "if expected and math.abs",
        "if false and math.abs",
        clock.test_a_claim_at_another_time_than_expected_does_nothing,
        found=False,
    ),
    Fault(
        "claim does not wait for the end of a hold",
        "claim",
        "if held_ms > 0 then",
        "if false then",
        clock.test_nothing_is_claimed_while_held,
        found=False,
    ),
    Fault(
        "claim without the room",
        "claim",
        "  elseif room > 0 and may_go(login, l, institution_of(a.source), due) then\n    dispatch(",
        "  elseif may_go(login, l, institution_of(a.source), due) then\n    dispatch(",
        rules.test_never_more_messages_than_threads_of_live_workers,
    ),
    Fault(
        "claim sends again without the room",
        "claim",
        "    if room > 0 then\n      push(",
        "    if true then\n      push(",
        rules.test_what_is_sent_again_takes_room_too,
    ),
    Fault(
        "claim does not take the account out of those that are due",
        "claim",
        "  redis.call('ZREM', 'due:' .. login, alias)\n",
        "",
        partial(
            rules.test_what_happens_to_an_account_in_flight_does_not_free_its_place, change="paused", is_begun=True
        ),
    ),
    Fault(
        "claim counts a message sent again as a loss",
        "claim",
        "      resent = resent + 1\n",
        "      resent = resent + 1\n      redis.call('HINCRBY', 'account:' .. alias, 'losses', 1)\n",
        rules.test_a_lost_message_is_sent_again_under_its_token_and_is_no_loss,
    ),
    Fault(
        "claim sends a lost message as a new attempt",
        "claim",
        "      hold(login, l, held)\n      resent",
        "      redis.call('HINCRBY', 'account:' .. alias, 'attempt', 1)\n"
        "      hold(login, l, token(alias, poll, attempt + 1))\n      resent",
        rules.test_a_lost_message_is_sent_again_under_its_token_and_is_no_loss,
    ),
    Fault(
        "claim frees the place of a lapsed poll before anybody has decided",
        "claim",
        "      return_lapsed(login, alias, a)\n      return false\n",
        "      return_lapsed(login, alias, a)\n      free(login, held)\n      return true\n",
        rules.test_a_lapsed_poll_is_returned_until_a_decision_is_applied,
    ),
    Fault(
        "claim numbers polls by the clock alone",
        "claim",
        "whole(math.max(account.poll + 1, now))",
        "whole(now)",
        rules.test_poll_numbers_increase_whatever_the_clock_does,
    ),
    Fault(
        "claim does not look at the due time",
        "claim",
        "if not alias or tonumber(due) > now then return end",
        "if not alias then return end",
        rules.test_the_next_account_of_a_lapsed_place_waits_for_its_time,
    ),
    # ------------------------------------------------------------------------------------------------------ begin
    Fault(
        "begin without the token",
        "begin",
        "if not is_dispatched(a, login, poll, attempt) then\n",
        "if not a.state then\n",
        rules.test_of_two_copies_one_is_begun_and_the_other_changes_nothing,
    ),
    Fault(
        "begin takes a credential that failed",
        "begin",
        "or redis.call('HEXISTS', 'failed', offered) == 1 then",
        "then",
        rules.test_a_failed_credential_is_refused_for_every_login_that_uses_it,
    ),
    Fault(
        "begin frees the place of a poll that another copy has begun",
        "begin",
        "  if not l.begun then free(login, held) end\n",
        "  if not is_begun(a, login, poll, attempt) then free(login, held) end\n",
        partial(rules.test_a_second_copy_of_a_begun_message_does_not_free_the_place, change="re-added"),
    ),
    Fault(
        "begin counts a repeated call as another refusal",
        "begin",
        "  if l.refused_by == caller then",
        "  if false then",
        rules.test_a_repeated_call_counts_one_refusal,
    ),
    Fault(
        "begin answers a repeated call although the login is blocked",
        "begin",
        " and not l.blocked then\n  return begun()",
        " then\n  return begun()",
        rules.test_a_caller_that_asks_again_after_a_block_gets_nothing,
        found=False,
    ),
    # -------------------------------------------------------------------------------------------------- callbacks
    Fault(
        "accept lets the login's next account go",
        "accept",
        "whole(hold_end(due))",
        "whole(now)",
        callbacks.test_the_login_is_held_for_login_hold_and_then_its_next_account_goes,
    ),
    Fault(
        "accept moves the lease of whoever holds the place now",
        "accept",
        "if redis.call('HGET', 'login:' .. login, 'holder') == token(alias, poll, attempt) then\n",
        "if redis.call('HEXISTS', 'login:' .. login, 'holder') then\n",
        rules.test_a_202_read_after_the_place_was_freed_does_not_touch_the_next_ones_lease,
    ),
    Fault(
        "accept takes a stale token",
        "accept",
        "if not is_begun(a, login, poll, attempt) then\n",
        "if not a.state then\n",
        callbacks.test_a_202_read_after_the_answer_was_settled_changes_nothing,
    ),
    Fault(
        "claim lets an awaiting account drop out when its place is freed",
        "claim",
        "    step(alias, login, 'awaiting', tonumber(a.due))\n",
        "",
        callbacks.test_without_a_callback_the_deadline_is_a_lapse,
    ),
    Fault(
        "claim does not push a lost settling again",
        "claim",
        "local lost = math.max(0,",
        "local lost = 0 * math.max(0,",
        callbacks.test_a_settling_whose_message_was_lost_is_pushed_again,
    ),
    Fault(
        "claim pushes settlings again however many wait",
        "claim",
        "math.min(most, lost)",
        "most",
        rules.test_a_night_without_workers_does_not_fill_the_queue_of_answers,
    ),
    Fault(
        "receive takes the same body twice",
        "receive",
        "  if redis.call('HEXISTS', key, 'body:' .. hash) == 1 then return 'repeated' end\n",
        "",
        callbacks.test_the_same_body_again_is_taken_once,
    ),
    Fault(
        "receive leaves the deadline in force",
        "receive",
        "  void_deadline()\n",
        "",
        callbacks.test_once_the_answer_is_there_no_deadline_applies,
    ),
    Fault(
        "receive takes any number of bodies",
        "receive",
        "  if tonumber(c.bodies or 0) >= MOST_BODIES then return 'full' end\n",
        "",
        callbacks.test_whoever_holds_the_url_cannot_fill_the_memory,
    ),
    Fault(
        "forget lets go of bodies that came meanwhile",
        "forget",
        "if left == 0 then\n",
        "if true then\n",
        callbacks.test_two_bodies_of_one_token_are_settled_one_after_the_other,
    ),
    Fault(
        "postpone decides although an answer is there",
        "postpone",
        " and (not a.answered or ARGV[10] == 'answer')",
        "",
        callbacks.test_once_the_answer_is_there_no_deadline_applies,
    ),
    Fault(
        "suspend decides although an answer is there",
        "suspend",
        "local is_overtaken = a.answered and mode ~= 'blocked' and ARGV[15] ~= 'answer'",
        "local is_overtaken = false",
        callbacks.test_once_the_answer_is_there_no_deadline_applies,
    ),
    Fault(
        "begin answers a repeated call although the poll was accepted",
        "begin",
        "and a.state == 'polling'\n",
        "and a.state ~= 'dispatched'\n",
        rules.test_a_caller_that_asks_again_after_its_poll_was_accepted_gets_nothing,
        found=False,
    ),
    # ----------------------------------------------------------------------------------------------------- settle
    Fault(
        "settle without the dedupe key",
        "settle",
        "alias, 'NX', 'PX', whole(keep_ms)",
        "alias, 'PX', whole(keep_ms)",
        rules.test_an_operation_is_published_once_and_another_poll_that_brings_it_again_goes_on,
    ),
    Fault(
        "settle forgets an operation before the stream does",
        "settle",
        "local keep_ms = config_ms('retention_ms') + DAY_MS",
        "local keep_ms = DAY_MS",
        rules.test_an_operation_is_remembered_a_day_longer_than_the_stream_remembers_it,
        found=False,
    ),
    Fault(
        "settle without the pins",
        "settle",
        "    if redis.call('SISMEMBER', pins, ARGV[i]) == 0 then return true end\n",
        "",
        rules.test_an_answer_without_balances_pins_nothing,
    ),
    Fault(
        "settle takes another account's operation",
        "settle",
        "  if owner and owner ~= alias then return true end\n",
        "",
        rules.test_another_accounts_operation_is_a_bad_answer,
    ),
    Fault(
        "settle moves latest backwards",
        "settle",
        "return p > q or (p == q and tonumber(attempt) > tonumber(a.latest_attempt or 0))",
        "return true",
        partial(
            rules.test_an_older_answer_is_published_and_moves_neither_latest_nor_changed,
            answers=[(0, 1, "11"), (1, 1, "10")],
            events=[(False, True), (True, False)],
            latest="11",
        ),
    ),
    Fault(
        "settle throws a late answer away",
        "settle",
        "  publish(stream, operation, source, 'balance.observed.v1', alias, fetched_at, text)\n",
        "  if current then publish(stream, operation, source, 'balance.observed.v1', alias, fetched_at, text) end\n",
        rules.test_an_answer_after_the_decision_on_its_lapse_is_published_late_and_the_retry_goes_on,
    ),
    Fault(
        "settle takes an older generation for the current one",
        "settle",
        "local defined = a.state ~= 'retired' and a.generation == generation",
        "local defined = a.state ~= 'retired'",
        partial(rules.test_an_older_generations_answer_moves_nothing_even_where_it_is_the_first, change="redefined"),
    ),
    # --------------------------------------------------------------------------------------------------- postpone
    Fault(
        "postpone takes a stale token",
        "postpone",
        "local postponed = is_begun(a, login, poll, attempt) and",
        "local postponed = a.login == login and",
        rules.test_a_decision_on_a_lapse_comes_too_late_for_the_next_attempt,
    ),
    Fault(
        "postpone begins the wait anew when it is repeated",
        "postpone",
        "if is_own(a, login, poll, attempt) and a.state == 'waiting' then\n",
        "postponed = postponed or is_own(a, login, poll, attempt)\nif false then\n",
        rules.test_two_beats_that_judge_the_same_lapse_are_one,
    ),
    # ---------------------------------------------------------------------------------------------------- suspend
    Fault(
        "suspend in two steps: the state first, the letter never",
        "suspend",
        "  explain(key, nil)\n",
        "",
        rules.test_two_beats_that_bury_the_same_poll_write_one_letter,
    ),
    Fault(
        "suspend in two steps: the letter first, the state never",
        "suspend",
        "redis.call('HSET', key, 'state', mode, 'queue', queue,",
        "redis.call('HSET', key, 'queue', queue,",
        rules.test_two_beats_that_bury_the_same_poll_write_one_letter,
    ),
    Fault(
        "suspend parks over a release that came meanwhile",
        "suspend",
        "if mode == 'parked' and own and a.releases and was_released_since() then return wait_shortly() end",
        "",
        partial(
            rules.test_a_release_while_the_poll_that_will_park_is_in_flight_becomes_a_short_wait,
            scope={"login": "acme"},
            is_woken=True,
            jump_ms=0,
        ),
    ),
    Fault(
        "block leaves a dispatched token valid",
        "suspend",
        "    void_holder(login)\n",
        "",
        rules.test_a_log_on_error_blocks_whatever_its_token_says,
    ),
    Fault(
        "block asks for a current token",
        "suspend",
        "was_replaced_since() and wait_shortly()",
        "(was_replaced_since() or not begun) and wait_shortly()",
        rules.test_a_log_on_error_blocks_whatever_its_token_says,
    ),
    Fault(
        "block does not ask whether the credential was replaced",
        "suspend",
        "was_replaced_since() and wait_shortly()",
        "false and wait_shortly()",
        rules.test_a_credential_replaced_since_blocks_nothing_and_is_remembered,
    ),
    Fault(
        "block does not remember what failed",
        "suspend",
        "  redis.call('HSET', 'failed', fingerprint, kind)\n",
        "",
        rules.test_a_failed_credential_is_refused_for_every_login_that_uses_it,
    ),
    Fault(
        "block for the log-on does not outweigh one for the key",
        "suspend",
        " or (l.blocked == 'key' and kind == 'bank') then",
        " then",
        rules.test_a_block_for_the_key_becomes_one_for_the_log_on_and_a_new_key_does_not_lift_it,
    ),
    # --------------------------------------------------------------------------------------------------- operators
    Fault(
        "release without the stamp",
        "release",
        "  redis.call('SET', 'released:' .. scope, number, 'EX', STAMP_S)\n",
        "",
        partial(
            rules.test_a_release_while_the_poll_that_will_park_is_in_flight_becomes_a_short_wait,
            scope={"aliases": ["a"]},
            is_woken=True,
            jump_ms=0,
        ),
    ),
    Fault(
        "release lets everybody go at once",
        "release",
        "now + #released * spread_ms",
        "now",
        rules.test_released_accounts_come_back_one_after_the_other,
        found=False,
    ),
    Fault(
        "redrive and release leave the letter",
        "shared",
        "  remove_letter(alias)\n  start_over(",
        "  start_over(",
        rules.test_released_accounts_come_back_one_after_the_other,
    ),
    Fault(
        "redrive takes a parked account",
        "redrive",
        "if a.state ~= 'suspended' then",
        "if not NEEDS_LETTER[a.state] then",
        lambda world: _stays_parked(world),
    ),
    Fault(
        "discard does not pause",
        "discard",
        "redis.call('HSET', key, 'paused', whole(now))\n",
        "",
        rules.test_a_discarded_letter_pauses_the_account,
    ),
    Fault(
        "unblock does not forgive",
        "unblock",
        "if by == 'operator' then forgive() else",
        "if by ~= 'operator' then",
        rules.test_an_operators_unblock_forgives_what_failed,
    ),
    Fault(
        "unblock takes a new key for a failed log-on",
        "unblock",
        "  if by ~= l.blocked then return 'the other credential failed' end\n",
        "",
        partial(
            rules.test_only_a_different_credential_of_the_kind_that_failed_unblocks,
            failed=Credential.BANK,
            fingerprint="bank-1",
            offered=Credential.KEY,
            new="key-2",
            answer="the other credential failed",
        ),
    ),
    Fault(
        "unblock leaves nothing to an operator alone",
        "unblock",
        "  if l.manual then return 'only an operator may unblock' end\n",
        "",
        rules.test_after_two_failed_log_ons_in_a_day_only_an_operator_unblocks,
    ),
    Fault(
        "unblock lets everybody go at once",
        "unblock",
        "redis.call('HSET', key, 'probing', 1)\n",
        "",
        rules.test_one_account_probes_and_the_others_wait_for_its_retry,
    ),
    Fault(
        "pause leaves a token valid",
        "pause",
        "  void(alias, a.login)\n",
        "",
        rules.test_pausing_voids_a_token_that_has_not_begun,
    ),
    Fault(
        "resume shortens a wait",
        "resume",
        "step(alias, a.login, a.state, tonumber(a.due))",
        "step(alias, a.login, a.state, now)",
        partial(rules.test_nothing_shortens_a_wait, event="resume"),
    ),
    Fault(
        "poll shortens a wait",
        "poll",
        "if a.state ~= 'scheduled' then",
        "if a.state ~= 'scheduled' and a.state ~= 'waiting' then",
        partial(rules.test_nothing_shortens_a_wait, event="poll"),
    ),
    # ---------------------------------------------------------------------------------------------- overdue, hold
    Fault(
        "overdue tells the ledger again and again",
        "overdue",
        "    if not a.overdue then tell(alias, a) end\n",
        "    tell(alias, a)\n",
        overdue.test_a_failed_poll_does_not_end_the_spell_nor_begin_another,
    ),
    Fault(
        "overdue tells of what may not be polled",
        "overdue",
        "and not a.paused and redis.call('HEXISTS', 'login:' .. a.login, 'blocked') == 0",
        "",
        overdue.test_what_was_blocked_before_it_settled_is_not_overdue,
        found=False,
    ),
    Fault(
        "settle does not end the spell",
        "settle",
        "  if a.overdue then publish_account",
        "  if false then publish_account",
        overdue.test_the_ledger_hears_once_of_a_spell_and_once_of_its_end,
    ),
    Fault(
        "begin leaves the account overdue",
        "begin",
        "unwatch(alias)\n",
        "",
        overdue.test_the_ledger_hears_once_of_a_spell_and_once_of_its_end,
    ),
    Fault(
        "a pause counts as time in which nobody polled",
        "shared",
        "local at = whole(math.max(due, now) + interval)",
        "local at = whole(due + interval)",
        partial(overdue.test_what_may_not_be_polled_is_not_overdue_and_counts_from_when_it_may, overlay="paused"),
    ),
    Fault(
        "hold moves nothing",
        "hold",
        "for _, login in ipairs(redis.call('SMEMBERS', 'logins')) do move(login) end\n",
        "",
        partial(clock.test_holding_moves_what_was_written_before_the_jump_and_only_that, by_ms=clock.FOUR_HOURS_MS),
        found=False,
    ),
    Fault(
        "hold moves what stands right already",
        "hold",
        "  return moved_at and ",
        "  return false and ",
        partial(clock.test_holding_moves_what_was_written_before_the_jump_and_only_that, by_ms=-clock.FOUR_HOURS_MS),
        found=False,
    ),
    Fault(
        "hold does not look who was first",
        "hold",
        "if (redis.call('HGET', 'config', 'jumped') or '0') ~= known then",
        "if false then",
        clock.test_a_hold_that_was_noted_is_not_noted_again,
        found=False,
    ),
    Fault(
        "purge takes an account that is still polled",
        "purge",
        "if a.state ~= 'retired' then",
        "if not a.state then",
        lambda world: remains.test_only_what_is_retired_and_over_is_purged(remains.lived(world.client)),
        found=False,
    ),
    Fault(
        "purge does not look whose callback it is handed",
        "purge",
        "if redis.call('HGET', 'callback:' .. ARGV[i], 'alias') == alias then",
        "if false then",
        lambda world: remains.test_nothing_is_left_of_a_purged_account_but_its_name_in_the_audit_trail(
            remains.lived(world.client)
        ),
        found=False,
    ),
    Fault(
        "migrate stamps what a newer program wrote",
        "migrate",
        "if found then return recorded(",
        "if false then return recorded(",
        lambda world: versions.test_a_newer_programs_state_is_not_migrated(versions.begun(world)),
        found=False,
    ),
    Fault(
        "an order is not written down",
        "shared",
        "  audit(actor, action, is_unknown and '?' or subject, outcome)\n",
        "",
        lambda world: trail.test_the_trail_is_trimmed_by_age_and_never_by_count(trail.fresh(world)),
        found=False,
    ),
    # ----------------------------------------------------------------------------------------------------- shared
    Fault(
        "the stream is trimmed by a clock at which nobody looked",
        "shared",
        "  if may_trim() then\n",
        "  if true then\n",
        clock.test_an_hour_without_a_beat_trims_nothing,
        found=False,
    ),
    Fault(
        "place does not respect the holder",
        "shared",
        "  elseif l.holder then\n",
        "  elseif false then\n",
        rules.test_a_held_place_is_until_and_nothing_of_the_login_goes_out_before,
    ),
    Fault(
        "place does not respect a block",
        "shared",
        "  if l.blocked then\n",
        "  if false then\n",
        rules.test_a_blocked_login_has_no_place_even_while_a_poll_is_under_way,
    ),
    Fault(
        "place does not respect the probe",
        "shared",
        "  if probing then return next_probe(login, probe) end\n",
        "",
        rules.test_one_account_probes_and_the_others_wait_for_its_retry,
    ),
    Fault(
        "free does not look who holds the place",
        "shared",
        "  if redis.call('HGET', 'login:' .. login, 'holder') == held then\n",
        "  if held then\n",
        rules.test_an_answer_after_the_decision_on_its_lapse_is_published_late_and_the_retry_goes_on,
    ),
    Fault(
        "the stream is trimmed by count",
        "shared",
        "'MINID', '~', whole(real_now() - config_ms('retention_ms'))",
        "'MAXLEN', '~', 1000",
        rules.test_the_stream_is_trimmed_by_age_and_never_by_count,
        found=False,
    ),
    # ----------------------------------------------------------------------------------------------------- counts
    Fault(
        "claim does not count what it takes",
        "claim",
        "  note(joined, set, alias)\n",
        "",
        lambda world: counts.test_an_account_is_counted_in_each_state_of_a_poll(_two(world)),
    ),
    Fault(
        "claim counts what it takes and leaves it where it was",
        "claim",
        "for_each_set('SREM', left)\n",
        "",
        lambda world: counts.test_one_claim_counts_what_it_takes_from_several_states_and_institutions(world.client),
    ),
    Fault(
        "begin does not count the account as polling",
        "begin",
        "  count_as(alias, a.institution, a.counted, 'polling')\n",
        "",
        lambda world: counts.test_an_account_is_counted_in_each_state_of_a_poll(_two(world)),
    ),
    Fault(
        "pause is not counted",
        "pause",
        "  recount(alias)\n",
        "",
        lambda world: counts.test_a_block_counts_every_account_of_its_login_and_a_pause_lies_over_it(world.client),
    ),
    Fault(
        "a block is counted for one account only",
        "suspend",
        "    recount_login(login)\n",
        "",
        lambda world: counts.test_a_block_counts_every_account_of_its_login_and_a_pause_lies_over_it(world.client),
    ),
    Fault(
        "unblock leaves the accounts counted as blocked",
        "unblock",
        "recount_login(login)\n",
        "",
        lambda world: counts.test_a_block_counts_every_account_of_its_login_and_a_pause_lies_over_it(world.client),
    ),
    Fault(
        "a retired account is still counted",
        "apply",
        "  take_off(alias, a.login)\n  recount(alias)\n",
        "  take_off(alias, a.login)\n",
        lambda world: counts.test_what_is_retired_is_not_counted_and_what_moves_is_counted_where_it_is(world.client),
    ),
    Fault(
        "postpone counts the end of a stale token",
        "postpone",
        "if postponed then\n",
        "count_end(alias, a.begun_at, ARGV[11])\nif postponed then\n",
        lambda world: counts.test_an_attempts_end_is_counted_once_however_often_it_is_told(_two(world)),
        found=False,
    ),
    Fault(
        "settle counts a late answer as an end",
        "settle",
        "elseif defined then\n",
        "elseif defined then\n  count_end(alias, a.begun_at, 'ok|none|ok')\n",
        lambda world: counts.test_a_late_answer_is_no_second_end(_two(world)),
        found=False,
    ),
    Fault(
        "an account that is not polled counts as old",
        "shared",
        "  if as_of and POLLED[seen] then\n",
        "  if as_of then\n",
        lambda world: counts.test_only_what_is_being_polled_can_be_old(
            _two(world), lambda w: w.timetable.pause("a"), lambda w: w.timetable.resume("a")
        ),
    ),
    Fault(
        "a callback is awaited although it has come",
        "receive",
        "  recount(c.alias)\n",
        "",
        lambda world: counts.test_a_callback_is_awaited_until_it_comes_and_unsettled_until_it_is_settled(world.client),
    ),
    Fault(
        "what is awaited grows old by a jump of the clock",
        "hold",
        "for _, key in ipairs({ 'awaiting', 'received', 'begins' }) do move_all(key) end\n",
        "",
        lambda world: counts.test_what_is_awaited_does_not_grow_old_by_a_jump_of_the_clock(world.client),
        found=False,
    ),
    Fault(
        "forget leaves the answer counted as unsettled",
        "forget",
        "  redis.call('ZREM', 'received', id)\n",
        "",
        lambda world: counts.test_a_callback_is_awaited_until_it_comes_and_unsettled_until_it_is_settled(world.client),
    ),
    # ----------------------------------------------------------------------------------------------------- limits
    Fault(
        "apply keeps the slots of another rate",
        "apply",
        "    let_go({ rate = true })\n",
        "",
        limits.test_another_rate_gives_new_slots,
        found=False,
    ),
    Fault(
        "apply keeps holding for a budget that is larger now",
        "apply",
        "    let_go({ ['login budget'] = true, ['total budget'] = true })\n",
        "",
        limits.test_a_larger_budget_lets_go_at_once,
        found=False,
    ),
    Fault(
        "apply forgets the very first budgets",
        "apply",
        "ARGV[i + 2]) end\n  set_budgets()\n",
        "ARGV[i + 2]) end\n",
        limits.test_a_spent_budget_holds_its_login_until_the_next_day_and_no_other,
        found=False,
    ),
    Fault(
        "apply leaves due what a longer gap forbids",
        "apply",
        "    step(d.alias, d.login, 'scheduled', tonumber(a.due))\n",
        "",
        limits.test_a_longer_gap_binds_what_was_due_already,
        found=False,
    ),
    Fault(
        "claim does not know that everything is paused",
        "claim",
        "  if limits.is_paused then return now + PAUSE_LOOK_MS, 'pause' end\n",
        "",
        limits.test_nothing_goes_out_while_everything_is_paused,
    ),
    Fault(
        "claim does not know that a budget is spent",
        "claim",
        "  if spent then return tomorrow(due), spent end\n",
        "",
        limits.test_a_spent_budget_holds_its_login_until_the_next_day_and_no_other,
        found=False,
    ),
    Fault(
        "claim does not know that a breaker is open",
        "claim",
        "  if is_open[institution] then return next_probe_at(institution), 'breaker' end\n",
        "",
        breakers.test_what_is_held_keeps_its_state_and_due_and_loses_nothing,
        found=False,
    ),
    Fault(
        "claim does not space its dispatches",
        "claim",
        "  if limits.rate then return slot_at(l, institution), 'rate' end\n",
        "",
        limits.test_a_login_without_a_slot_is_moved_to_its_own_and_looked_at_no_sooner,
        found=False,
    ),
    Fault(
        "claim forgets the probe that it sends",
        "claim",
        "  if is_open[institution] then send_probe(institution, token(alias, poll, attempt)) end\n",
        "",
        breakers.test_it_is_probed_with_one_poll_at_a_time_after_growing_pauses,
        found=False,
    ),
    Fault(
        "claim lets those wait that are behind a full institution",
        "claim",
        "math.min(at_first + held_back, most)",
        "math.min(at_first, most)",
        limits.test_logins_that_wait_for_their_slots_take_nobodys_room,
        found=False,
    ),
    Fault(
        "a jump of the clock leaves licences behind",
        "hold",
        "      if not is_new(members[i + 1]) then move_score(kind .. institution, members[i]) end\n",
        "",
        limits.test_a_jump_of_the_clock_gives_no_licence_twice,
        found=False,
    ),
    Fault(
        "the pause over everything makes accounts overdue",
        "overdue",
        "if hold_left() > 0 or redis.call('HEXISTS', 'config', 'paused_at') == 1 then",
        "if hold_left() > 0 then",
        limits.test_nobody_is_overdue_while_everything_is_paused,
    ),
    Fault(
        "claim keeps a breaker that is forgotten",
        "claim",
        "  if not is_open[institution] then close_breaker(institution) end\n",
        "",
        breakers.test_a_breaker_that_nobody_probes_for_a_day_is_forgotten,
        found=False,
    ),
    Fault(
        "a new day begins with A",
        "shared",
        "  return midnight() + math.floor(math.max(0, math.min(share, 1)) * 60000)\n",
        "  return midnight()\n",
        limits.test_a_new_day_begins_with_who_is_due_for_longest,
        found=False,
    ),
    Fault(
        "begin asks for no licence",
        "begin",
        "  if free_at > now then return 'rate', free_at end\n",
        "",
        limits.test_who_finds_no_licence_gives_the_account_back_as_it_was,
        found=False,
    ),
    Fault(
        "begin forgets the licences that it gives",
        "begin",
        "  if limits.rate then use_licence(institution, held) end\n",
        "",
        limits.test_who_finds_no_licence_gives_the_account_back_as_it_was,
        found=False,
    ),
    Fault(
        "begin keeps the place of what it gives back",
        "begin",
        "  free(login, held)\n  if why ~= 'rest' then hold_back(",
        "  if why ~= 'rest' then hold_back(",
        limits.test_who_finds_no_licence_gives_the_account_back_as_it_was,
        found=False,
    ),
    Fault(
        "begin gives back what is then sent at once",
        "begin",
        "  if why ~= 'rest' then hold_back(login, not_before, why) end\n",
        "",
        limits.test_who_finds_no_licence_gives_the_account_back_as_it_was,
        found=False,
    ),
    Fault(
        "begin does not know that a budget is spent",
        "begin",
        "  if spent then return spent, tomorrow(a.due) end\n",
        "",
        limits.test_what_was_dispatched_before_the_budget_was_spent_gives_its_account_back,
        found=False,
    ),
    Fault(
        "begin does not count requests",
        "begin",
        "  spend(login, limits)\n",
        "",
        limits.test_a_spent_budget_holds_its_login_until_the_next_day_and_no_other,
        found=False,
    ),
    Fault(
        "begin lets anybody through an open breaker",
        "begin",
        "    if b.probe ~= held then",
        "    if false then",
        breakers.test_what_was_dispatched_before_gives_its_account_back,
        found=False,
    ),
    Fault(
        "pause_all leaves tokens valid",
        "pause_all",
        "for _, login in ipairs(redis.call('SMEMBERS', 'logins')) do void_holder(login) end\n",
        "",
        limits.test_nothing_goes_out_while_everything_is_paused,
    ),
    Fault(
        "resume_all leaves logins where claim put them",
        "resume_all",
        "let_go({ pause = true })\n",
        "",
        limits.test_resuming_everything_brings_all_back_at_once_but_who_was_paused_alone,
    ),
    Fault(
        "resume under a pause over everything",
        "resume",
        "if a.state and redis.call('HEXISTS', 'config', 'paused_at') == 1 then",
        "if false then",
        partial(limits.test_under_it_one_account_cannot_be_resumed_or_polled, order=ops.resume),
    ),
    Fault(
        "poll under a pause over everything",
        "poll",
        "  if redis.call('HEXISTS', 'config', 'paused_at') == 1 then return 'everything paused' end\n",
        "",
        partial(limits.test_under_it_one_account_cannot_be_resumed_or_polled, order=ops.poll),
    ),
    Fault(
        "poll within the gap",
        "poll",
        "  if gap_end(a) > now then return 'gap' end\n",
        "",
        limits.test_poll_is_refused_inside_the_gap_and_says_when,
        found=False,
    ),
    Fault(
        "postpone does not say what failed",
        "postpone",
        "  note_failure(login, a.source, held, ARGV[12], rest_ms)\n",
        "",
        limits.test_generic_failures_are_counted_by_login_until_one_of_its_accounts_succeeds,
        found=False,
    ),
    Fault(
        "suspend does not say what failed",
        "suspend",
        "  note_failure(login, a.source, held, ARGV[17], tonumber(ARGV[18]))\n",
        "",
        breakers.test_dead_letters_count_like_waits,
        found=False,
    ),
    Fault(
        "settle does not say that it works again",
        "settle",
        "  note_success(login, source)\n",
        "",
        breakers.test_a_success_lets_everybody_go_at_once,
        found=False,
    ),
    Fault(
        "place does not wait for a slot",
        "shared",
        "math.max(tonumber(l.not_before or 0), tonumber(l.rests_until or 0))",
        "tonumber(l.rests_until or 0)",
        partial(limits.test_nothing_makes_a_login_earlier_than_its_slot_and_nothing_loses_it, event="poll"),
    ),
    Fault(
        "place lets a deadline wait for a slot",
        "shared",
        "whole(math.min(deadline or held, held))",
        "whole(held)",
        limits.test_a_deadline_asks_nothing_and_waits_for_no_slot,
        found=False,
    ),
    Fault(
        "a licence of the clock's future is worth nothing",
        "shared",
        "    redis.call('ZADD', key, whole(now), each)\n",
        "    redis.call('ZREM', key, each)\n",
        limits.test_a_clock_that_was_put_back_gives_no_licence_twice,
        found=False,
    ),
    Fault(
        "min_gap binds regular slots only",
        "shared",
        "  if state == 'scheduled' then due = math.max(due, gap_end(a)) end\n",
        "",
        partial(limits.test_min_gap_binds_whatever_makes_an_account_due, event="redrive"),
    ),
    Fault(
        "a gap as long as the clock was put back",
        "shared",
        "math.min(begun_at, now) + gap",
        "begun_at + gap",
        limits.test_a_clock_that_was_put_back_makes_no_gap_longer,
    ),
    Fault(
        "the pause over everything voids what its account left behind",
        "shared",
        "  if holder and redis.call('HGET', 'account:' .. holder, 'login') == login then",
        "  if holder then",
        limits.test_a_moved_account_is_voided_where_it_is_now,
        found=False,
    ),
    Fault(
        "a success does not end a row of generic failures",
        "shared",
        "  redis.call('HDEL', 'login:' .. login, 'generic')\n",
        "",
        limits.test_generic_failures_are_counted_by_login_until_one_of_its_accounts_succeeds,
        found=False,
    ),
    Fault(
        "a breaker counts accounts, not logins",
        "shared",
        "whole(now), cause .. ' ' .. login)",
        "whole(now), cause .. ' ' .. held)",
        partial(breakers.test_nothing_less_holds_an_institution, history=breakers.one_login),
        found=False,
    ),
    Fault(
        "a breaker adds causes up",
        "shared",
        "    if string.match(each, '^%S+') == cause then",
        "    if true then",
        partial(breakers.test_nothing_less_holds_an_institution, history=breakers.two_causes),
        found=False,
    ),
    Fault(
        "a breaker never forgets",
        "shared",
        "  redis.call('ZREMRANGEBYSCORE', key, '-inf', whole(now - BREAKER_MS))\n",
        "",
        partial(breakers.test_nothing_less_holds_an_institution, history=breakers.too_slowly),
        found=False,
    ),
    Fault(
        "a breaker opens in spite of a success between",
        "shared",
        "  redis.call('DEL', 'failing:' .. institution)\n",
        "",
        partial(breakers.test_nothing_less_holds_an_institution, history=breakers.with_a_success_between),
        found=False,
    ),
    Fault(
        "a closed breaker leaves logins where claim put them",
        "shared",
        "  let_go({ breaker = true })\n",
        "",
        breakers.test_a_success_lets_everybody_go_at_once,
        found=False,
    ),
    Fault(
        "a breaker waits for ever for a probe that is gone",
        "shared",
        "  if a.state ~= 'polling' then return a.state == 'dispatched' end\n",
        "  if a.state ~= 'polling' then return true end\n",
        partial(breakers.test_a_probe_that_is_gone_is_followed_by_another, how="paused"),
        found=False,
    ),
    Fault(
        "a probe's pause counts from its beginning",
        "shared",
        "whole(now + probe_pause(tonumber(b.probes))))\n  elseif",
        "b.next_probe or 0)\n  elseif",
        breakers.test_the_pause_begins_anew_at_the_probes_end,
        found=False,
    ),
    Fault(
        "place knows no rest",
        "shared",
        "math.max(tonumber(l.not_before or 0), tonumber(l.rests_until or 0))",
        "tonumber(l.not_before or 0)",
        partial(rests.test_nothing_goes_out_before_the_rest_is_over_whatever_happens, event="poll"),
        found=False,
    ),
    Fault(
        "a rest is no failure's",
        "shared",
        "  if rest_ms then rest(login, rest_ms) end\n",
        "",
        rests.test_it_is_said_once_when_a_login_begins_to_rest,
        found=False,
    ),
    Fault(
        "a balance does not end the rest",
        "shared",
        "  if redis.call('HDEL', 'login:' .. login, 'rests_until', 'rested_at') > 0 then",
        "  if false then",
        rests.test_a_balance_that_was_on_its_way_ends_the_rest,
        found=False,
    ),
    Fault(
        "each body of a callback is a log-on",
        "shared",
        "  if redis.call('EXISTS', answer) == 1 and redis.call('HSETNX', answer, 'noted', 1) == 0 then return end\n",
        "",
        partial(
            rests.test_a_callback_that_comes_too_late_spent_a_log_on_too_but_one_only, error_type="RETRY_IMMEDIATELY"
        ),
        found=False,
    ),
    Fault(
        "postpone does not count what came too late",
        "postpone",
        "  note_late_answer(login, held, ARGV[12], rest_ms)\n",
        "",
        partial(
            rests.test_a_callback_that_comes_too_late_spent_a_log_on_too_but_one_only, error_type="RETRY_IMMEDIATELY"
        ),
        found=False,
    ),
    Fault(
        "suspend does not count what came too late",
        "suspend",
        "  note_late_answer(login, held, ARGV[17], tonumber(ARGV[18]))\n",
        "",
        partial(rests.test_a_callback_that_comes_too_late_spent_a_log_on_too_but_one_only, error_type="DO_NOT_RETRY"),
        found=False,
    ),
    Fault(
        "claim knows no rest",
        "claim",
        "  if held_until(l) > now then\n",
        "  if false then\n",
        rests.test_a_place_that_becomes_free_lets_nobody_go_while_the_login_rests,
        found=False,
    ),
    Fault(
        "begin knows no rest",
        "begin",
        "  if is_resting(l) then return 'rest', tonumber(l.rests_until) end\n",
        "",
        rests.test_what_was_dispatched_when_the_rest_began_is_given_back,
        found=False,
    ),
    Fault(
        "begin leaves a hold that outlives the rest",
        "begin",
        "  if why ~= 'rest' then hold_back(login, not_before, why) end\n",
        "  hold_back(login, not_before, why)\n",
        rests.test_what_was_dispatched_when_the_rest_began_is_given_back,
        found=False,
    ),
    Fault(
        "after a rest login_hold lets another one go",
        "accept",
        "  return has_rested and due or math.min(now + hold_ms, due)\n",
        "  return math.min(now + hold_ms, due)\n",
        rests.test_with_callbacks_nobody_else_goes_before_the_first_has_ended,
        found=False,
    ),
    Fault(
        "a jump of the clock ends the rest",
        "hold",
        "  move_rest(login)\n",
        "",
        partial(rests.test_a_jump_of_the_clock_moves_the_rest, jump_ms=6 * rests.HOUR_MS),
        found=False,
    ),
    Fault(
        "a jump moves a rest that began after it",
        "hold",
        "  if is_new(redis.call('HGET', key, 'rested_at')) then return end\n",
        "",
        rests.test_a_rest_that_began_after_the_jump_is_not_moved,
        found=False,
    ),
    Fault(
        "unblock does not end a rest",
        "unblock",
        "  end_rest(login)\n  place(login)\n",
        "",
        rests.test_an_operator_ends_it_and_one_more_failure_begins_another,
        found=False,
    ),
    Fault(
        "unblock leaves the rest below the block",
        "unblock",
        "if by ~= 'key' and is_resting(l) then end_rest(login) end\n",
        "",
        partial(
            rests.test_what_unblocks_the_bank_log_on_ends_the_rest_below,
            unblock=lambda world: world.timetable.unblock("acme"),
        ),
        found=False,
    ),
    Fault(
        "a new key ends the rest",
        "unblock",
        "if by ~= 'key' and is_resting(l)",
        "if is_resting(l)",
        partial(rests.test_nothing_goes_out_before_the_rest_is_over_whatever_happens, event="a new key lifts a block"),
        found=False,
    ),
    # -------------------------------------------------------------------------- limits, rests and what lies over them
    Fault(
        "a probe that awaits its callback is never over",
        "shared",
        "  if a.state == 'awaiting' then return tonumber(a.due) > now end\n",
        "  if a.state == 'awaiting' then return true end\n",
        partial(interplay.test_a_probe_that_cannot_lapse_is_over_all_the_same, how="paused"),
        found=False,
    ),
    Fault(
        "a probe that is polled is never over",
        "shared",
        "  return a.begun_at + lease_ms() > now\n",
        "  return true\n",
        partial(interplay.test_a_probe_that_cannot_lapse_is_over_all_the_same, how="blocked"),
        found=False,
    ),
    Fault(
        "a jump of the clock leaves slots that nobody holds",
        "hold",
        "redis.call('DEL', 'slots')\n",
        "",
        interplay.test_after_a_jump_of_the_clock_the_first_slot_is_now,
        found=False,
    ),
    Fault(
        "place holds a deadline back",
        "shared",
        "math.min(deadline or held, held)",
        "held",
        partial(interplay.test_what_holds_a_login_back_holds_no_deadline_of_it, why="budget"),
        found=False,
    ),
    Fault(
        "claim looks for no deadline behind what is held back",
        "claim",
        "    alias, due = next_deadline(login)\n",
        "    alias, due = next_account(login, l.probing, l.probe)\n",
        partial(interplay.test_what_holds_a_login_back_holds_no_deadline_of_it, why="rest"),
        found=False,
    ),
    Fault(
        "purge looks at the account's last login only",
        "purge",
        "ipairs(redis.call('SMEMBERS', 'logins'))",
        "ipairs({ a.login })",
        interplay.test_what_another_login_has_under_way_is_not_purged,
        found=False,
    ),
    Fault(
        "migrate does not count accounts",
        "migrate",
        "    recount(alias)\n",
        "",
        interplay.test_migrating_counts_what_an_older_program_did_not,
        found=False,
    ),
    Fault(
        "migrate does not count blocks",
        "migrate",
        "  if blocked then redis.call('HSET', 'blocked', login, blocked) end\n",
        "",
        interplay.test_migrating_counts_what_an_older_program_did_not,
        found=False,
    ),
    Fault(
        "apply leaves the token's end of a login that nobody uses",
        "apply",
        "    redis.call('ZREM', 'token_expires', login)\n",
        "",
        interplay.test_nobody_is_told_of_a_removed_logins_token,
        found=False,
    ),
    Fault(
        "a rest is not listed",
        "shared",
        "  redis.call('ZADD', 'resting', whole(ends), login)\n",
        "",
        partial(rests.test_who_rests_is_listed_until_the_rest_ends, end="a balance"),
        found=False,
    ),
    Fault(
        "a balance leaves the rest listed",
        "shared",
        " > 0 then redis.call('ZREM', 'resting', login) end",
        " > 0 then return end",
        partial(rests.test_who_rests_is_listed_until_the_rest_ends, end="a balance"),
        found=False,
    ),
    Fault(
        "an operator leaves the rest listed",
        "shared",
        "  redis.call('ZREM', 'resting', login)\nend",
        "end",
        partial(rests.test_who_rests_is_listed_until_the_rest_ends, end="an operator"),
        found=False,
    ),
    Fault(
        "a jump of the clock leaves the list of rests behind",
        "hold",
        "  move_score('resting', login)\n",
        "",
        partial(rests.test_a_jump_of_the_clock_moves_the_rest, jump_ms=-6 * rests.HOUR_MS),
        found=False,
    ),
]

#: Found by the machine within some seconds, so that the normal run shows that it can fail.
QUICKLY_FOUND = {
    "begin without the token",
    "claim does not take the account out of those that are due",
    "suspend in two steps: the state first, the letter never",
    "unblock lets everybody go at once",
    "resume shortens a wait",
    "place does not respect the holder",
}


def _two(world: World) -> World:
    world.apply(read("a", "b"))
    return world


def _stays_parked(world: World) -> None:
    rules.two(world)
    world.park(world.start("a").token)
    assert world.timetable.redrive("a") == "parked"


def arguments_of(check: Check, store: redis.Redis, server: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What pytest would hand the test as fixtures."""
    function = check.func if isinstance(check, partial) else check
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    prepare = {
        "test_callbacks": lambda: callbacks.CallbackWorld(store, "a", "b"),
        "test_overdue": lambda: overdue.prepared(store),
        "test_breaker": lambda: breakers.arranged(store),
    }
    world = prepare.get(function.__module__, lambda: World(store))()
    fixtures = {"world": world, "valkey_server": server, "monkeypatch": monkeypatch}
    return {name: fixtures[name] for name in names if name in fixtures}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught_by_its_test(
    store: redis.Redis, valkey_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    fault.check(**arguments_of(fault.check, store, valkey_server, monkeypatch))
    store.flushall()
    with patched(fault.patch), pytest.raises((AssertionError, ValueError)):  # ValueError: nothing to unpack
        fault.check(**arguments_of(fault.check, store, valkey_server, monkeypatch))


@pytest.mark.parametrize(
    "fault",
    [fault for fault in FAULTS if fault.found and (IS_LONG or fault.name in QUICKLY_FOUND)],
    ids=lambda fault: fault.name,
)
def test_a_planted_fault_is_found_by_the_machine(store: redis.Redis, fault: Fault) -> None:
    with pytest.raises((AssertionError, redis.ResponseError, ValueError)):  # a script may also answer nonsense
        run(store, profile(600, 40, shrink=False), fault.patch)


def test_every_script_has_a_planted_fault() -> None:
    assert {path.stem for path in rules.LUA.glob("*.lua")} == {fault.script for fault in FAULTS}


def test_the_machine_is_quiet_without_a_fault(store: redis.Redis) -> None:
    run(store, profile(5, 20, shrink=False))
