"""What tests share: small networks, tables, videos, tolerances, processes."""
