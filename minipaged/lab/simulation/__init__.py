"""Systems and engines on a virtual clock: workloads, servers, rooflines, a runner without weights."""
