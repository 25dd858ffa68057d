-- Keeps the description of a base; a newer one of the same base takes its place.
--
-- KEYS[1] bases      hash     digest -> JSON
-- KEYS[2] base       string   JSON with the field "digest": the one base of a registry that could hold no other
-- ARGV[1] digest     of the base
-- ARGV[2] base       JSON
-- Returns 1 when the base was not known before, else 0.
local former = redis.call('GET', KEYS[2])
if former then
  redis.call('HSETNX', KEYS[1], cjson.decode(former)['digest'], former)
  redis.call('DEL', KEYS[2])
end
return redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
