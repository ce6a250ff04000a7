from kernel_cases import default_dtype, kernel, threads

__all__ = ["default_dtype", "kernel", "threads"]
