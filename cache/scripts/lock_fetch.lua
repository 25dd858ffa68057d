-- Takes the right to fetch something from its source, or keeps it; it ends by itself when its owner falls silent.
--
-- KEYS[1] fetch      string  owner, with a time to live
-- ARGV[1] owner
-- ARGV[2] ttl        milliseconds
-- Returns 1 when the owner has it now, 0 when another has.
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
