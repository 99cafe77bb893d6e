-- Makes a scheduled account due now: an operator's command. It never shortens a wait, nor the gap after the last poll,
-- and never lifts an overlay.
--
-- ARGV  1 alias; the last one: who asks
-- Returns { "due" } or { "refused", state }

local actor, alias = take_actor(), ARGV[1]
local a = fields('account:' .. alias, 'state', 'login', 'paused', 'begun_at', 'min_gap')

local function why_not()
  if a.state ~= 'scheduled' then return a.state or 'unknown' end
  if redis.call('HEXISTS', 'config', 'paused_at') == 1 then return 'everything paused' end
  if a.paused then return 'paused' end
  if redis.call('HEXISTS', 'login:' .. a.login, 'blocked') == 1 then return 'blocked' end
  if gap_end(a) > now then return 'gap' end
  return nil
end

local reason = why_not()
if reason then return recorded(actor, 'poll', alias, { 'refused', reason }) end
step(alias, a.login, 'scheduled', now)
place(a.login)
return recorded(actor, 'poll', alias, { 'due' })
