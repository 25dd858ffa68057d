-- Reads the whole registry at one point in time, and makes it first when there is none.
--
-- KEYS[1] epoch      string  which registry this is; another one after it was emptied
-- KEYS[2] revision   integer counts every change of an adapter
-- KEYS[3] base       string  JSON
-- KEYS[4] adapters   hash    adapter_id -> record
-- ARGV[1] candidate  epoch to take when there is none
-- Returns epoch, revision, base ("" when none), then adapter_id, record, ...
redis.call('SET', KEYS[1], ARGV[1], 'NX')
local rows = redis.call('HGETALL', KEYS[4])
table.insert(rows, 1, redis.call('GET', KEYS[1]))
table.insert(rows, 2, redis.call('GET', KEYS[2]) or '0')
table.insert(rows, 3, redis.call('GET', KEYS[3]) or '')
return rows
