"""A process that relays until it is told to stop, and writes its counters twice a second."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

from memstate_sa.relay import Relay, RetryPolicy
from tests.torture import child
from tests.torture.app import App, Setting


def run(setting: Setting, number: int, life: int) -> None:
    name = f"worker-{number}"
    stopping = child.begin(setting, name, life)
    app = App(setting, name, life)
    policy = RetryPolicy(delay_s=0.05, max_delay_s=1.0)
    relay = app.memory.relay(app.engine, lease_s=setting.lease_s, page_size=50, policy=policy)
    with relay:
        while not stopping.wait(0.25):
            report(setting, f"{name}.{life}", relay)
    report(setting, f"{name}.{life}", relay)
    app.close()


def report(setting: Setting, name: str, relay: Relay) -> None:
    done = {worker.delivery.name: asdict(worker.delivery.slot_worker.counters) for worker in relay._workers}
    path = setting.folder / "counters" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps({"cpu_s": time.process_time(), "indexes": done}))
    path.with_suffix(".new").replace(path)
