"""Telling the outside: events, their payloads and signature, and delivery over HTTP.

What decides *when* an event is sent, and keeps it until it is, is `orchestration`'s.
"""
