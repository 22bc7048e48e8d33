-- Stores a verified token with all that belongs to it, unless something better is there. Without an owner: without a
-- lease, which takes more to replace what is stored.
local epoch, token, cookies, note, ttl = tonumber(ARGV[3]), ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local issued, seen = tonumber(ARGV[8]) or -1, ARGV[9]

local stored = text(TOKEN)
local meta = fitting_meta(stored)
local stored_epoch = meta and number(meta.epoch) or 0
local held = OWNER ~= '' and text(LEASE) == OWNER
local same = stored == token
local whole_already = same and meta ~= nil and meta.verified == true and text(COOKIES) == cookies

if OWNER ~= '' then
  -- Done already, by the same request on a connection that broke.
  if not held and whole_already and stored_epoch == epoch then return 'committed' end
  if not held then return 'lost' end
  if stored_epoch > epoch then return 'fenced' end
end
if stored and not same and redis.sha1hex(stored) ~= seen then
  if not meta then return 'foreign' end
  local stored_issued = number(meta.iat) or -1
  local older = stored_issued > issued or (OWNER == '' and stored_issued == issued)
  if older and not is_denied(meta.sha256) then return 'older' end
end

epoch = math.max(epoch, stored_epoch)
redis.call('SET', TOKEN, token, 'EX', ttl)
redis.call('SET', COOKIES, cookies, 'EX', ttl)
local heading = '{"sha1":"' .. redis.sha1hex(token) .. '","epoch":' .. whole(epoch) .. ','
redis.call('SET', META, heading .. string.sub(note, 2), 'EX', ttl)
redis.call('DEL', UNVERIFIED, BACKOFF, TRIES, WAITING)
if held then redis.call('DEL', LEASE) end
-- Of what was there already nobody needs to hear.
if held or not whole_already then tell('committed', epoch) end
return 'committed'
