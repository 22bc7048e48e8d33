-- What every script begins with. Time comes from PX and PTTL alone, and a value that others may have put under a key of
-- ours fails nothing.
local TOKEN, COOKIES, META, LEASE, EPOCH = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local UNVERIFIED, BACKOFF, DENIED, TRIES, WAITING = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local CHANNEL, OWNER = ARGV[1], ARGV[2]

-- MGET, since a key of another type then counts as absent.
local function text(key)
  return redis.call('MGET', key)[1] or nil
end

local function object(value)
  local read, decoded = pcall(cjson.decode, value or '')
  return read and type(decoded) == 'table' and decoded or nil
end

-- The largest number that is exact in Lua, Redis and JSON alike.
local MOST = 9007199254740991

local function number(value)
  local whole = type(value) == 'number' and value >= 0 and value <= MOST and value == math.floor(value)
  return whole and value or nil
end

-- Of digits alone; 0 for all else.
local function count(text)
  return number(tonumber(string.match(text or '', '^%d+$') or '')) or 0
end

local function whole(value)
  return string.format('%.0f', value)
end

local function fitting_meta(token)
  local meta = object(text(META))
  return token and meta and meta.sha1 == redis.sha1hex(token) and meta or nil
end

local function last_epoch()
  return count(text(EPOCH))
end

local function is_denied(sha256)
  if type(sha256) ~= 'string' then return false end
  return type(redis.pcall('ZSCORE', DENIED, sha256)) == 'string'
end

-- The number of the last refusal.
local function last_denial()
  local top = redis.pcall('ZREVRANGEBYSCORE', DENIED, whole(MOST), 0, 'WITHSCORES', 'LIMIT', 0, 1)
  return count(top[2])
end

-- How long a key lives on that must lapse, `most` milliseconds at most; whoever has left it there for longer.
local function left(key, most)
  local ttl = redis.call('PTTL', key)
  if ttl >= 0 and ttl <= most then return ttl end
  redis.pcall('PEXPIRE', key, most) -- A replica refuses that.
  return most
end

-- How many may have heard it, the caller included. Whoever may not use the channel looks now and then, and so do the
-- others: nobody knows how many there are.
local function tell(event, epoch)
  local heard = redis.pcall('PUBLISH', CHANNEL, '{"event":"' .. event .. '","epoch":' .. whole(epoch) .. '}')
  return type(heard) == 'number' and heard or 2
end

