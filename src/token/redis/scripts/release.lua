-- Gives the lease back if it is still the owner's.
if text(LEASE) ~= OWNER then return 0 end
redis.call('DEL', LEASE)
tell('released', last_epoch())
return 1
