"""Whose text it is: read, brought into a format, dealt to clients, cut into sequences."""
