"""Faults on real VMs: every step of a migration, and whoever can die or fall silent there."""
