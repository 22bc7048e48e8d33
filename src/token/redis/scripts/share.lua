-- Stores a token that nobody could verify yet, and gives the lease back.
local epoch, note, ttl, issued, sha1 = tonumber(ARGV[3]), ARGV[4], ARGV[5], tonumber(ARGV[6]) or -1, ARGV[7]

local meta = fitting_meta(text(TOKEN))
local shared = object(text(UNVERIFIED))
local held = text(LEASE) == OWNER

if not held then
  local again = shared and type(shared.token) == 'string' and redis.sha1hex(shared.token) == sha1
  return again and number(shared.epoch) == epoch and 'committed' or 'lost'
end
local function is_better(other)
  return other and (number(other.iat) or -1) > issued and not is_denied(other.sha256)
end
if meta and (number(meta.epoch) or 0) > epoch then return 'fenced' end
if is_better(meta) or is_better(shared) then return 'older' end

redis.call('SET', UNVERIFIED, note, 'EX', ttl)
redis.call('DEL', LEASE, BACKOFF, TRIES, WAITING)
tell('committed', epoch)
return 'committed'
