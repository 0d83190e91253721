"""The Ray backend: each deployment is a group of actors, and requests ride direct sockets."""
