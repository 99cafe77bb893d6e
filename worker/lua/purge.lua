-- Deletes what is kept of a retired account, part after part: an operator's command.
--
-- ARGV  1 alias  2 "entries" | "callbacks" | "account", the last of them last
--   entries:   3 stream  4 … ids of entries
--   callbacks: 3 … digests of tokens
--   account:   nothing more; the last one: who asks
-- Returns { "purged", how many keys or entries } or { "refused", state }
--
-- What finds them reads by SCAN and XRANGE, which a script could not do without holding everybody up; so every part is
-- looked at again here: nothing of another account goes. The audit trail keeps the account's name, by age.

local actor, alias, part = take_actor(), ARGV[1], ARGV[2]
local key = 'account:' .. alias
local a = fields(key, 'state', 'login', 'generation')

-- Whether something of it is still to come, or would be told of by what stays.
local function why_not()
  if a.state ~= 'retired' then return a.state or 'unknown' end
  local l = fields('login:' .. a.login, 'letter')
  -- What is under way may be of a login that it was taken off.
  for _, login in ipairs(redis.call('SMEMBERS', 'logins')) do
    local holder = redis.call('HGET', 'login:' .. login, 'holder')
    if holder and string.match(holder, '^(%S+)') == alias then return 'polling' end
  end
  if l.letter and string.find(l.letter, '"' .. alias .. '"', 1, true) then return 'blocked' end
  for _, id in ipairs(redis.call('ZRANGE', 'answers', 0, -1)) do
    if string.match(id, '^(%S+)') == alias then return 'awaiting' end
  end
  return nil
end

local function entry_of(stream, id)
  local found = redis.call('XRANGE', stream, id, id)[1]
  local entry = {}
  for i = 1, found and #found[2] or 0, 2 do entry[found[2][i]] = found[2][i + 1] end
  return entry
end

local function purge_entries(stream)
  local gone = 0
  for i = 4, #ARGV do
    local entry = entry_of(stream, ARGV[i])
    if entry.subject == alias then
      gone = gone + redis.call('XDEL', stream, ARGV[i])
      local operation = 'operation:' .. (entry.id or '')
      if redis.call('GET', operation) == alias then redis.call('DEL', operation) end
    end
  end
  return gone
end

local function purge_callbacks()
  local gone = 0
  for i = 3, #ARGV do
    if redis.call('HGET', 'callback:' .. ARGV[i], 'alias') == alias then
      gone = gone + redis.call('DEL', 'callback:' .. ARGV[i])
    end
  end
  return gone
end

local function purge_account()
  remove_letter(alias)
  for generation = 1, tonumber(a.generation or 0) do redis.call('DEL', 'pins:' .. alias .. ':' .. generation) end
  if redis.call('HGET', 'login:' .. a.login, 'probe') == alias then redis.call('HDEL', 'login:' .. a.login, 'probe') end
  redis.call('HDEL', 'latest', alias)
  return redis.call('DEL', key, 'history:' .. alias, 'released:' .. alias)
end

local reason = why_not()
if reason then return recorded(actor, 'purge', alias, { 'refused', reason }) end
if part == 'entries' then return { 'purged', purge_entries(ARGV[3]) } end
if part == 'callbacks' then return { 'purged', purge_callbacks() } end
return recorded(actor, 'purge', alias, { 'purged', purge_account() })
