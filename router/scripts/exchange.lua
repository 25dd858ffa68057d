-- Adds what a router has served, and tells what all have.
--
-- KEYS[1] served   hash    flow -> weighted tokens served by all routers, ever
-- KEYS[2] changes  zset    flow -> number of the exchange that changed it last
-- KEYS[3] leads    hash    flow -> "a b": weighted tokens that it was ahead in its tenant, and its tenant of others
-- KEYS[4] number   integer counts exchanges that changed something
-- ARGV[1] since    number of the exchange the caller knows; -1 when it knows none
-- ARGV[2] ttl      seconds all this is kept after the last exchange
-- ARGV[3] most     flows to remember; those that were changed longest ago are forgotten
-- ARGV[4..]        flow, weighted tokens served, lead; repeated
-- Returns { number, { flow, served, ... changed since }, { flow, lead, ... when the caller knew none } }.
if #ARGV > 3 then
  local number = redis.call('INCR', KEYS[4])
  for i = 4, #ARGV, 3 do
    redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1])
    redis.call('ZADD', KEYS[2], number, ARGV[i])
    redis.call('HSET', KEYS[3], ARGV[i], ARGV[i + 2])
  end
  local surplus = redis.call('ZCARD', KEYS[2]) - tonumber(ARGV[3])
  if surplus > 0 then
    for _, flow in ipairs(redis.call('ZRANGE', KEYS[2], 0, surplus - 1)) do
      redis.call('HDEL', KEYS[1], flow)
      redis.call('HDEL', KEYS[3], flow)
      redis.call('ZREM', KEYS[2], flow)
    end
  end
end
local since = tonumber(ARGV[1])
local served = {}
for _, flow in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. since, '+inf')) do
  served[#served + 1] = flow
  served[#served + 1] = redis.call('HGET', KEYS[1], flow)
end
local leads = {}
if since < 0 then
  leads = redis.call('HGETALL', KEYS[3])
end
for _, key in ipairs(KEYS) do
  redis.call('EXPIRE', key, ARGV[2])
end
return { tonumber(redis.call('GET', KEYS[4]) or '0'), served, leads }
