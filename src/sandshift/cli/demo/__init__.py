"""The demo: two hosts on one machine, a sandbox that moves between them under load, and the proof printed."""
