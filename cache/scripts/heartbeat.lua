-- Says that a node lives, what it holds and what its engines rely on; takes back what the dead held.
--
-- KEYS[1] nodes      zset  node_id -> last heard of, ms
-- KEYS[2] residency  hash  node_id -> JSON
-- KEYS[3] leases     zset  "owner digest" -> end, ms
-- ARGV[1] node_id
-- ARGV[2] ttl        milliseconds until a silent node counts as dead and its leases end
-- ARGV[3] residency  JSON: digest -> list of tiers
-- ARGV[4..]          leases: "owner digest", owners being engines of this node
-- Returns a flat list node_id, residency, ... of the living nodes.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local ttl = tonumber(ARGV[2])
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
for i = 4, #ARGV do
  redis.call('ZADD', KEYS[3], now + ttl, ARGV[i])
end
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
for _, node in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - ttl)) do
  redis.call('ZREM', KEYS[1], node)
  redis.call('HDEL', KEYS[2], node)
end
return redis.call('HGETALL', KEYS[2])
