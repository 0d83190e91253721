-- POST a JSON body, the first argument behind `--`, and print one line of figures:
-- requests, microseconds, errors, and the median of the latencies in microseconds.

function init(args)
  wrk.method = "POST"
  wrk.body = args[1]
  wrk.headers["Content-Type"] = "application/json"
end

function done(summary, latency, requests)
  local e = summary.errors
  local errors = e.connect + e.read + e.write + e.status + e.timeout
  local p50 = latency:percentile(50)
  io.write(
    string.format("figures: %d %d %d %d\n", summary.requests, summary.duration, errors, p50)
  )
end
