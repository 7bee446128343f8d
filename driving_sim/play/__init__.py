"""Drive in a world model in the browser: the server, the drives of its sessions, and the page."""
