"""What model families are built of, on packed rows `[T, ...]`: `decoder` is the stack that most families share."""
