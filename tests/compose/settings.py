"""Checks what `docker compose config --format json` makes of docker-compose.prod.yml; what is wrong is said and ends with 1."""

import json
import sys

project = json.load(sys.stdin)
services = project["services"]
wrong = []


def check(service: str, what: str, holds: object) -> None:
    if not holds:
        wrong.append(f"{service}: {what}")


check("project", "the services", set(services) == {"token-sidecar", "flaresolverr", "redis", "parser"})
for name, service in services.items():
    check(name, "restart", service.get("restart") == (None if name == "parser" else "unless-stopped"))
    check(name, "a memory limit", service.get("mem_limit"))
    check(name, "log rotation", set(service.get("logging", {}).get("options", {})) == {"max-size", "max-file"})
    check(name, "no capabilities", service.get("cap_drop") == ["ALL"] and not service.get("cap_add"))
    check(name, "no new privileges", service.get("security_opt") == ["no-new-privileges:true"])
    check(name, "a read-only root", service.get("read_only") or name == "flaresolverr")
    check(name, "nothing published", not service.get("ports"))
    check(name, "a limit on threads", service.get("pids_limit") or name == "parser")
    networks = {"token-sidecar": {"parsers", "backend"}, "parser": {"parsers"}}.get(name, {"backend"})
    check(name, f"the networks {networks}", set(service["networks"]) == networks)

solver = services["flaresolverr"]
environment = {"HEADLESS": "true", "DISABLE_MEDIA": "true", "LANG": "en_US", "LOG_LEVEL": "info"}
check("flaresolverr", "its environment", environment.items() <= solver["environment"].items())
check("flaresolverr", "a tag that is pinned", solver["image"].split(":")[-1][:2] == "v3")
check("flaresolverr", "2 GB, 512 MB of shared memory", (solver["mem_limit"], solver["shm_size"]) == ("2147483648", "536870912"))
test = ["CMD", "curl", "-fsS", "-m", "50", "http://localhost:8191/health"]
health = {"test": test, "interval": "1m0s", "timeout": "55s", "start_period": "1m0s"}
check("flaresolverr", "its health check", health.items() <= solver["healthcheck"].items())

redis = services["redis"]
check("redis", "a password", "requirepass" in redis["command"][0])
check("redis", "an append-only file", "--appendonly yes" in redis["command"][0])
check("redis", "a health check", redis["healthcheck"]["test"])

check("token-sidecar", "no neighbour that it waits for", not services["token-sidecar"].get("depends_on"))
check("token-sidecar", "more time to stop than DRAIN_TIMEOUT", services["token-sidecar"]["stop_grace_period"] == "40s")
waits = services["parser"].get("depends_on", {}).get("token-sidecar", {})
check("parser", "waits for a healthy sidecar", waits.get("condition") == "service_healthy")
mounts = services["parser"]["volumes"]
check("parser", "certs alone, read-only", [(m["source"], m.get("read_only")) for m in mounts] == [("certs", True)])

for line in wrong:
    print(f"not so: {line}", file=sys.stderr)
sys.exit(bool(wrong))
