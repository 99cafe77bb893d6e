-- Brings a suspended account back into the timetable and removes its letter, in one step: an operator's command.
--
-- ARGV  1 stream  2 alias; the last one: who asks
-- Returns { "redriven" } or { "refused", state }

local actor, stream, alias = take_actor(), ARGV[1], ARGV[2]
local a = fields('account:' .. alias, 'state', 'login')

if a.state ~= 'suspended' then return recorded(actor, 'redrive', alias, { 'refused', a.state or 'unknown' }) end
bring_back(stream, alias, a.login, now, 'redrive')
place(a.login)
return recorded(actor, 'redrive', alias, { 'redriven' })
