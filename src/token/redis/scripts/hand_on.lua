-- The owner's solver is away: gives the lease to whoever waits for it, unless nobody does, or several in a row were no
-- better off.
local epoch, most, memory_ms = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local holder = text(LEASE)
if holder ~= OWNER then
  -- Done already, by the same request on a connection that broke.
  return not holder and last_epoch() == epoch and 1 or 0
end
local tries = redis.pcall('INCR', TRIES)
if type(tries) ~= 'number' then
  redis.call('SET', TRIES, 1)
  tries = 1
end
redis.call('PEXPIRE', TRIES, memory_ms)
local waiting = redis.pcall('ZCARD', WAITING)
if tries >= most or type(waiting) ~= 'number' or waiting == 0 then return 0 end
redis.call('DEL', LEASE)
tell('released', epoch)
return 1
