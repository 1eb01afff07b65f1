"""What do we know of each server? The endpoint table: numpy columns, one row per endpoint. Pure."""
