-- Gives the right to fetch something back, unless it has passed to another meanwhile.
--
-- KEYS[1] fetch      string  owner, with a time to live
-- ARGV[1] owner
-- Returns 1 when it was the owner's, 0 when not.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
return redis.call('DEL', KEYS[1])
