"""`python run.py CONFIG [key=value ...]`, also for the deepspeed launcher. All of it is in speft_train.cli."""

from speft_train.cli import run_main

if __name__ == "__main__":
    run_main()
