-- Brings a suspended account back into the timetable and removes its letter, in one step: an operator's command.
--
-- ARGV  1 stream  2 alias
-- Returns { "redriven" } or { "refused", state }

local stream, alias = ARGV[1], ARGV[2]
local a = fields('account:' .. alias, 'state', 'login')

if a.state ~= 'suspended' then return { 'refused', a.state or 'unknown' } end
bring_back(stream, alias, a.login, now, 'redrive')
place(a.login)
return { 'redriven' }
