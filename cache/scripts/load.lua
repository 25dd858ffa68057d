-- Reads the whole registry at one point in time, and makes it first when there is none.
--
-- KEYS[1] epoch      string  which registry this is; another one after it was emptied
-- KEYS[2] revision   integer counts every change of an adapter
-- KEYS[3] bases      hash    digest -> JSON
-- KEYS[4] base       string  JSON with the field "digest": the one base of a registry that could hold no other
-- KEYS[5] adapters   hash    adapter_id -> record
-- ARGV[1] candidate  epoch to take when there is none
-- Returns epoch, revision, { base, ... }, then adapter_id, record, ...
redis.call('SET', KEYS[1], ARGV[1], 'NX')
local former = redis.call('GET', KEYS[4])
if former then
  redis.call('HSETNX', KEYS[3], cjson.decode(former)['digest'], former)
  redis.call('DEL', KEYS[4])
end
local rows = redis.call('HGETALL', KEYS[5])
table.insert(rows, 1, redis.call('GET', KEYS[1]))
table.insert(rows, 2, redis.call('GET', KEYS[2]) or '0')
table.insert(rows, 3, redis.call('HVALS', KEYS[3]))
return rows
