"""Requests that take long beside requests that must not wait for them, on real mounts. Orders of events are
asserted, never times.
"""
