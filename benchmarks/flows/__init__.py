"""Flows against their peers: targets, and one worker process per library."""
