-- A run has failed: its back-off holds for all, unless somebody else has begun since.
local epoch, note, pause_ms = tonumber(ARGV[3]), ARGV[4], ARGV[5]
local holder = text(LEASE)
if holder and holder ~= OWNER or not holder and last_epoch() ~= epoch then return 0 end
redis.call('SET', BACKOFF, note, 'PX', pause_ms)
redis.call('DEL', LEASE, WAITING, TRIES)
tell('failed', epoch)
return 1
