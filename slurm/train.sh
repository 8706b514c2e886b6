#!/usr/bin/env bash
# sbatch slurm/train.sh recipes/X.yaml --key value: the same launch/run.py as by hand, on one node of the job.
# Submit from the checkout. Override what stands here on sbatch's command line: sbatch --gpus-per-node=2 slurm/train.sh ...
#SBATCH --job-name=r1zero
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log

# ---- this site: partition, account, modules, environment ----
##SBATCH --partition=
##SBATCH --account=
python="${R1ZERO_PYTHON:-.venv/bin/python}"
# ---- end of this site ----

cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}" || exit 2
exec srun --kill-on-bad-exit=1 "$python" launch/run.py "$@"
