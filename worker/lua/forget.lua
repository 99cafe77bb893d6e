-- Lets go of a callback's bodies that have been settled: called by a worker, after settle, postpone or suspend.
--
-- ARGV  1 login  2 alias  3 poll  4 attempt  5 … hashes of the bodies
-- Returns { how many bodies are left }

local id = token(ARGV[2], ARGV[3], ARGV[4])
local key = 'answer:' .. id
local left = 0

for i = 5, #ARGV do redis.call('HDEL', key, 'body:' .. ARGV[i]) end
for _, name in ipairs(redis.call('HKEYS', key)) do
  if string.sub(name, 1, 5) == 'body:' then left = left + 1 end
end
if left == 0 then
  redis.call('DEL', key)
  redis.call('ZREM', 'answers', id)
  redis.call('ZREM', 'received', id)
end
return { left }
