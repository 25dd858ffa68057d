-- Writes an adapter's record, unless it was changed by someone else meanwhile.
--
-- KEYS[1] adapters   hash     adapter_id -> record
-- KEYS[2] revision   integer  counts every change of an adapter
-- KEYS[3] events     channel  where the change is told
-- ARGV[1] adapter_id
-- ARGV[2] record     JSON
-- ARGV[3] expected   the record it replaces, "" when there is none
-- Returns the revision of this change, 0 when the record there is another than expected.
if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[3] then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
local revision = redis.call('INCR', KEYS[2])
redis.call('PUBLISH', KEYS[3], cjson.encode({ revision = revision, adapter_id = ARGV[1] }))
return revision
