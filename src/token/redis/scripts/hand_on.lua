-- The owner has no solver that answers: gives the lease to whoever waits for it or may come to, unless nobody does, or
-- several in a row were no better off.
local epoch, weight, most, memory_ms = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
-- Done already, by the same request on a connection that broke; or it has lapsed, which comes to the same.
if text(LEASE) ~= OWNER then return 1 end
local tries = redis.pcall('INCRBY', TRIES, weight)
if type(tries) ~= 'number' then
  redis.call('SET', TRIES, weight)
  tries = weight
end
redis.call('PEXPIRE', TRIES, memory_ms)
if tries >= most then return 0 end
local waiting = redis.pcall('ZCARD', WAITING)
-- The owner's own subscription hears it too. One that does not wait yet may be about to.
if tell('released', epoch) < 2 and (type(waiting) ~= 'number' or waiting == 0) then return 0 end
redis.call('DEL', LEASE)
return 1
