-- Deletes an adapter's record, unless it was changed by someone else meanwhile.
--
-- KEYS[1] adapters   hash     adapter_id -> record
-- KEYS[2] events     channel  where the change is told
-- ARGV[1] adapter_id
-- ARGV[2] expected   the record to delete
-- Returns 1 when deleted, 0 when the record is another than expected.
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then
  return 0
end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('PUBLISH', KEYS[2], cjson.encode({ kind = 'deleted', adapter_id = ARGV[1] }))
return 1
