"""`nmcompile doctor`."""

import sys

import click


@click.command()
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def doctor(is_json: bool) -> None:
    """Say what works on this machine: versions, hardware, and each backend, on which a small layer is run.

    The exit status is 1 if something does not work that ought to.

    \b
    Example:
      nmcompile doctor
    """
    from nmcompile.api.doctor import diagnose

    found = diagnose()
    click.echo(found.to_json() if is_json else found)
    if not found.is_healthy:
        sys.exit(1)
