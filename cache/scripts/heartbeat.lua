-- Says that a node lives, what it holds and what its engines rely on; takes back what the dead held.
--
-- KEYS[1] nodes      zset    node_id -> last heard of, ms
-- KEYS[2] residency  hash    node_id -> JSON
-- KEYS[3] leases     zset    "node/engine digest" -> end, ms
-- KEYS[4] epoch      string
-- KEYS[5] revision   integer
-- KEYS[6] last_use   zset    digest -> last used, ms
-- ARGV[1] node_id
-- ARGV[2] ttl        milliseconds until a silent node counts as dead and its leases end
-- ARGV[3] residency  JSON, handed on as it is
-- ARGV[4] since      ms: uses since then are returned
-- ARGV[5] renewed    how many leases follow that are to be renewed
-- ARGV[6] used       how many digests follow then that were used since the last heartbeat
-- ARGV[7..]          leases to renew, "node/engine digest"; digests; leases that have ended
-- Returns { epoch or "", revision, { node_id, residency, ... of the living nodes }, { living leases },
--   { digest, last used, ... since `since` }, now in ms }.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local ttl = tonumber(ARGV[2])
local last_renewed = 6 + tonumber(ARGV[5])
local last_used = last_renewed + tonumber(ARGV[6])
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
for i = 7, #ARGV do
  if i <= last_renewed then
    redis.call('ZADD', KEYS[3], now + ttl, ARGV[i])
  elseif i <= last_used then
    redis.call('ZADD', KEYS[6], now, ARGV[i])
  else
    redis.call('ZREM', KEYS[3], ARGV[i])
  end
end
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
for _, node in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - ttl)) do
  redis.call('ZREM', KEYS[1], node)
  redis.call('HDEL', KEYS[2], node)
end
return {
  redis.call('GET', KEYS[4]) or '',
  tonumber(redis.call('GET', KEYS[5]) or '0'),
  redis.call('HGETALL', KEYS[2]),
  redis.call('ZRANGE', KEYS[3], 0, -1),
  redis.call('ZRANGEBYSCORE', KEYS[6], ARGV[4], '+inf', 'WITHSCORES'),
  now,
}
