-- bench.py's client where wrk is installed; it takes and prints what bench_client.py does.
-- `wrk ... --script bench_client.lua URL -- BODIES CONNECTIONS SECONDS LIMIT NUMBER`
-- Sends request NUMBER and those after it until the time or the limit is up; then connections park in delay(), and when
-- no request is in flight any more wrk is told to end.
local ffi = require("ffi")
ffi.cdef[[
  typedef struct { long s; long ns; } moment;
  int clock_gettime(int, moment *); int getpid(void); int kill(int, int);
]]
local words, bodies, moment, threads = {}, {}, ffi.new("moment"), {}
local connections, seconds, limit, number, started
local asked, reopened = 0, 0
issued, good, bad, lost, late, elapsed = 0, 0, 0, 0, 0, 0 -- globals, for done() to read

local function now()
  ffi.C.clock_gettime(0, moment)
  return tonumber(moment.s) + tonumber(moment.ns) / 1e9
end

function setup(thread) threads[1] = thread end

function init(args)
  connections, seconds, limit, number = tonumber(args[2]), tonumber(args[3]), tonumber(args[4]), tonumber(args[5])
  local lines = io.lines(args[1])
  for word in lines():gmatch("%S+") do words[#words + 1] = word end
  for line in lines do bodies[#bodies + 1] = line end
  wrk.headers["Content-Type"] = "application/json"
end

function request()
  local turn = math.floor(number / #bodies)
  local fresh = words[turn % #words + 1] .. " " .. words[math.floor(turn / #words) % #words + 1]
  local body = bodies[number % #bodies + 1]:gsub("{fresh}", fresh)
  number = number + 1
  return wrk.format("POST", nil, nil, body)
end

function delay() -- wrk asks when a connection opens and after each reply; the milliseconds until its next request
  started = started or now()
  asked = asked + 1
  local over = issued >= limit or now() - started >= seconds
  if asked > connections + good + bad + reopened then -- the server closed one that waits here; wrk opened it again
    reopened = reopened + 1
    if over then late = late + 1 else lost = lost + 1 end -- late: it was parked, nothing is amiss
  end
  if not over then
    issued = issued + 1
    return 0
  end
  if good + bad + lost >= issued then ffi.C.kill(ffi.C.getpid(), 2) end -- wrk ends on SIGINT as at its time's end
  return 86400000
end

function response(status)
  if status == 200 then good = good + 1 else bad = bad + 1 end
  elapsed = now() - started
end

function done(summary, latency)
  local function get(name) return threads[1]:get(name) end
  local failed = summary.errors
  local errors = failed.connect + failed.read + failed.write + failed.timeout - get("late") + get("bad")
  errors = errors + get("issued") - get("good") - get("bad") - get("lost") -- those that were never answered
  print(string.format('\n{"requests": %d, "seconds": %.6f, "p50_ms": %.3f, "p99_ms": %.3f, "errors": %d}',
    get("good"), get("elapsed"), latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, errors))
end
