-- Says which base adapters are validated against. Another base is taken only while no adapter is registered.
--
-- KEYS[1] base       string   JSON with the field "digest"
-- KEYS[2] adapters   hash
-- ARGV[1] base       JSON with the field "digest"
-- Returns the base in force: ARGV[1], or the one that stays.
local current = redis.call('GET', KEYS[1])
if current and redis.call('HLEN', KEYS[2]) > 0 then
  if cjson.decode(current)['digest'] ~= cjson.decode(ARGV[1])['digest'] then
    return current
  end
end
redis.call('SET', KEYS[1], ARGV[1])
return ARGV[1]
