"""The cache service: which adapters there are, and where their bytes are.

residency, failures      decide: what moves are legal, what to load and evict, when to try again (no I/O, no clock)
artifact, peft_config    an adapter's files -> validated, packed artifact; everything not served is refused by name
sources, builder, tiers  bytes: read from outside, packed off the loop, kept as whole files on disk and in shared memory
shelf, engines           what this node has on DISK and HOST, and what each engine has on its DEVICE
keys, registry, scripts  Redis: every key, one operation per Lua script
view, watchers           this node's copy of the registry, and who is told of its changes
registry_link            keeps the copy right: heartbeats, hints, losing Redis and finding it
manager                  the one loop; adapters: what callers ask of it
service, wire            the gRPC edge
"""
