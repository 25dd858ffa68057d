-- Writes an adapter's record, unless it was changed by someone else meanwhile.
--
-- KEYS[1] adapters   hash     adapter_id -> record
-- KEYS[2] events     channel  where the change is told
-- ARGV[1] adapter_id
-- ARGV[2] record     JSON
-- ARGV[3] expected   the record it replaces, "" when there is none, "*" when it does not matter
-- ARGV[4] kind       of the event: "registered" or "updated"
-- Returns 1 when written, 0 when the record is another than expected.
local current = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if ARGV[3] ~= '*' and current ~= ARGV[3] then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('PUBLISH', KEYS[2], cjson.encode({ kind = ARGV[4], adapter_id = ARGV[1] }))
return 1
