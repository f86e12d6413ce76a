-- One operation on all quotas of a request, in one round trip: everything is looked at first, then all is used or nothing.
-- The arithmetic is that of limit_usage.py.
--
-- KEYS   two for each demand: a hash with what is used, a sorted set of its leases by the time (Unix seconds) they expire.
--        All begin with the same {hash tag}, so that a cluster keeps them on one node.
-- ARGV   operation, lease id, lease seconds, tokens, reserved, again, slots; then for each demand rpm, tpm, concurrency and
--        daily tokens, 0 for no limit
--          acquire   count a request, take its slots; refused as well if not a single token is left
--          reserve   take `tokens`
--          settle    the request used `tokens`. The lease knows what was reserved; if it is gone, `reserved` tells what the
--                    caller knows. `again` is 1 if this may have been done before: then a lease that is gone is settled.
-- Reply  index of the demand that refused, from 1; 0 if all is well
--        what of it is used up, and the seconds to wait
--        the time (Unix seconds), then for each demand the levels of requests, tokens and tokens of the day
--
-- Fields of the hash: requests, tokens, at (Unix seconds that the levels are of), day, day_tokens, and for each lease
-- lease:<id> = "<tokens reserved> <day> <tokens reserved on that day>".

local MINUTE, DAY, TOLERANCE, SLOT_WAIT = 60, 86400, 1e-6, 1
local MOST_EXPIRED = 100  -- leases cleared away by one operation
local operation, lease, lease_seconds = ARGV[1], ARGV[2], tonumber(ARGV[3])
local amount, reserved, again = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6] == '1'
local slots = tonumber(ARGV[7])
local count = #KEYS / 2

local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
local today = math.floor(now / DAY)
local day_left = (today + 1) * DAY - now

local function text(number)
  return string.format('%.17g', number)
end

local function parse(record)
  local tokens, day, day_tokens = string.match(record, '^(%d+) (%d+) (%d+)$')
  return tonumber(tokens), tonumber(day), tonumber(day_tokens)
end

-- A lease whose server died: its slot is free again, and so are the tokens of the day. Those of the minute have drained.
local function clear_expired(s)
  local expired = redis.call('ZRANGEBYSCORE', s.leases, '-inf', text(now), 'LIMIT', 0, MOST_EXPIRED)
  for _, id in ipairs(expired) do
    local record = redis.call('HGET', s.key, 'lease:' .. id)
    if record then
      local _, day, day_tokens = parse(record)
      if day == s.day then
        s.day_tokens = math.max(0, s.day_tokens - day_tokens)
      end
      redis.call('HDEL', s.key, 'lease:' .. id)
    end
    redis.call('ZREM', s.leases, id)
  end
end

local function load(i)
  local s = { key = KEYS[2 * i - 1], leases = KEYS[2 * i] }
  local base = 7 + 4 * (i - 1)
  s.rpm, s.tpm = tonumber(ARGV[base + 1]), tonumber(ARGV[base + 2])
  s.concurrency, s.daily = tonumber(ARGV[base + 3]), tonumber(ARGV[base + 4])
  local f = redis.call('HMGET', s.key, 'requests', 'tokens', 'at', 'day', 'day_tokens')
  s.requests, s.tokens, s.at = tonumber(f[1]) or 0, tonumber(f[2]) or 0, tonumber(f[3]) or now
  s.day, s.day_tokens = tonumber(f[4]) or today, tonumber(f[5]) or 0
  local elapsed = math.max(0, now - s.at)
  s.requests = s.rpm > 0 and math.max(0, s.requests - elapsed * s.rpm / MINUTE) or 0
  s.tokens = s.tpm > 0 and math.max(0, s.tokens - elapsed * s.tpm / MINUTE) or 0
  if today > s.day then
    s.day, s.day_tokens = today, 0
  elseif today < s.day - 1 then
    s.day = today
  end
  clear_expired(s)
  s.record = redis.call('HGET', s.key, 'lease:' .. lease)
  return s
end

local function save(s)
  redis.call('HSET', s.key, 'requests', text(s.requests), 'tokens', text(s.tokens), 'at', text(now),
    'day', text(s.day), 'day_tokens', text(s.day_tokens))
  -- Twice a day: the count of today is needed until tomorrow, and a step of the clock must not drop it.
  local keep = math.ceil(math.max(2 * MINUTE, lease_seconds, s.daily > 0 and 2 * DAY or 0)) + 60
  redis.call('EXPIRE', s.key, keep)
  redis.call('EXPIRE', s.leases, keep)
end

-- The first slot of a lease has its name and its record, further ones only a member of the set each.
local function slot(k)
  return k == 1 and lease or lease .. '#' .. k
end

local function hold(s, tokens, day, day_tokens)
  for k = 1, slots do
    redis.call('ZADD', s.leases, text(now + lease_seconds), slot(k))
  end
  redis.call('HSET', s.key, 'lease:' .. lease, string.format('%.0f %.0f %.0f', tokens, day, day_tokens))
end

local function charge(s, tokens, day_tokens)
  if s.tpm > 0 then
    s.tokens = math.min(math.max(0, s.tokens + tokens), 2 * s.tpm)
  end
  if s.daily > 0 then
    s.day_tokens = math.min(math.max(0, s.day_tokens + day_tokens), 2 * s.daily)
  end
end

local states = {}
for i = 1, count do
  states[i] = load(i)
end

local function reply(refused, kind, wait)
  local out = { tostring(refused), kind, text(wait), text(now) }
  for i = 1, count do
    local s = states[i]
    out[#out + 1] = text(s.requests)
    out[#out + 1] = text(s.tokens)
    out[#out + 1] = text(s.day_tokens)
  end
  return out
end

if operation == 'settle' then
  for i = 1, count do
    local s = states[i]
    if s.record then
      local tokens, day, day_tokens = parse(s.record)
      local change = amount - tokens
      -- What was reserved yesterday is not given back to today.
      charge(s, change, math.max(change, day == s.day and -day_tokens or 0))
      for k = 1, slots do
        redis.call('ZREM', s.leases, slot(k))
      end
      redis.call('HDEL', s.key, 'lease:' .. lease)
    elseif not again then
      -- It expired or the data was lost: the day's tokens were given back or forgotten; the minute's have drained.
      charge(s, math.max(0, amount - reserved), amount)
    end
    save(s)
  end
  return reply(0, '', 0)
end

local refused, kind, wait = 0, '', -1
local function refuse(i, why, seconds)
  if seconds > wait then
    refused, kind, wait = i, why, seconds
  end
end

local acquire = operation == 'acquire'
local tokens = acquire and 1 or amount
for i = 1, count do
  local s = states[i]
  if s.daily > 0 and s.day_tokens + tokens > s.daily then
    refuse(i, 'daily_tokens', day_left)
  end
  if s.rpm > 0 and acquire and s.requests + 1 - s.rpm > TOLERANCE then
    refuse(i, 'requests', (s.requests + 1 - s.rpm) * MINUTE / s.rpm)
  end
  if s.tpm > 0 and s.tokens + tokens - s.tpm > TOLERANCE then
    refuse(i, 'tokens', (s.tokens + tokens - s.tpm) * MINUTE / s.tpm)
  end
  if s.concurrency > 0 and acquire and redis.call('ZCARD', s.leases) + slots > s.concurrency then
    refuse(i, 'concurrency', SLOT_WAIT)
  end
end
if refused > 0 then
  -- Written all the same: a server that may only be read is no store, also while it has nothing but refusals to give.
  for i = 1, count do
    save(states[i])
  end
  return reply(refused, kind, wait)
end

for i = 1, count do
  local s = states[i]
  if acquire then
    if s.rpm > 0 then
      s.requests = s.requests + 1
    end
    hold(s, 0, s.day, 0)
  else
    local before, day, day_tokens = 0, s.day, 0
    if s.record then
      before, day, day_tokens = parse(s.record)
    end
    charge(s, amount, amount)
    hold(s, before + amount, s.day, (day == s.day and day_tokens or 0) + amount)
  end
  save(s)
end
return reply(0, '', 0)
