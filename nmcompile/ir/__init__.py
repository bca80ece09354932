"""The intermediate representation: layers, the plan, the three graphs, and the contracts of passes and backends."""
