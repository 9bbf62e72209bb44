"""The native gate held to its twin, fuzzed, and under load."""
