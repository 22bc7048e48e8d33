-- Reads all there is, and takes the lease if it is free and nothing speaks against it.
local lease_ms, wish, known_denials = tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
local longest_pause_ms, waiting_ms = tonumber(ARGV[6]), ARGV[7]
local known = {}
for i = 8, #ARGV do known[ARGV[i]] = true end

local values = redis.call('MGET', TOKEN, COOKIES, META, UNVERIFIED, BACKOFF, LEASE)
local token, holder = values[1] or nil, values[6] or nil
local meta, unverified, backoff = fitting_meta(token), object(values[4]), object(values[5])

local token_denied = meta ~= nil and is_denied(meta.sha256)
local unverified_denied = unverified ~= nil and is_denied(unverified.sha256)

-- Something is there that the caller has not yet found useless.
local function has_news()
  if token and not token_denied and not known[redis.sha1hex(token)] then return true end
  return unverified ~= nil and type(unverified.token) == 'string' and not unverified_denied
    and not known[redis.sha1hex(unverified.token)]
end

local function is_held_up()
  return backoff ~= nil and not (wish == 'needed' and backoff.routine == true)
end

-- The owner waits for whoever has the lease, until it looks again. A replica refuses that.
local function note_waiting()
  local noted = redis.pcall('ZADD', WAITING, 0, OWNER)
  -- A key of another type has no business there.
  if type(noted) == 'table' then redis.pcall('DEL', WAITING) end
  redis.pcall('PEXPIRE', WAITING, waiting_ms)
end

local state, detail = 'free', '0'
if holder and holder == OWNER and wish ~= 'none' then
  -- The same request once more, after a connection that broke.
  redis.call('PEXPIRE', LEASE, lease_ms)
  state, detail = 'granted', whole(last_epoch())
elseif holder then
  state, detail = 'held', whole(left(LEASE, lease_ms))
  if wish ~= 'none' then note_waiting() end
elseif wish == 'force' or (wish ~= 'none' and not has_news() and not is_held_up()) then
  -- The counter may have been lost, the metadata not.
  local epoch = math.max(last_epoch(), meta and number(meta.epoch) or 0) + 1
  redis.call('SET', EPOCH, whole(epoch))
  redis.call('SET', LEASE, OWNER, 'PX', lease_ms)
  redis.pcall('ZREM', WAITING, OWNER)
  state, detail = 'granted', whole(epoch)
end

-- The refused tokens that the caller has not heard of; all, if Redis has lost some.
local last = last_denial()
local after = last < known_denials and 0 or known_denials
local denials = redis.pcall('ZRANGEBYSCORE', DENIED, '(' .. whole(after), whole(MOST))
if denials.err then denials = {} end

return {
  values[1], values[2], values[3], token_denied and 1 or 0,
  values[4], unverified_denied and 1 or 0,
  values[5], values[5] and left(BACKOFF, longest_pause_ms) or 0,
  state, detail, whole(last), denials,
}
