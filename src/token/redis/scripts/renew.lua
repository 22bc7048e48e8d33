-- Prolongs the lease if it is still the owner's.
if text(LEASE) ~= OWNER then return 0 end
redis.call('PEXPIRE', LEASE, ARGV[3])
return 1
