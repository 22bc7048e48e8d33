-- Remembers that the API refused a token. The scores number the entries, so that a reader can ask for the new ones.
local sha256, memory_ms, most = ARGV[3], ARGV[4], tonumber(ARGV[5])
if is_denied(sha256) then return 0 end
-- A key of another type has no business there.
if type(redis.pcall('ZSCORE', DENIED, sha256)) == 'table' then redis.call('DEL', DENIED) end
redis.call('ZADD', DENIED, whole(last_denial() + 1), sha256)
redis.call('ZREMRANGEBYRANK', DENIED, 0, -1 - most)
redis.call('PEXPIRE', DENIED, memory_ms)
tell('denied', last_epoch())
return 1
