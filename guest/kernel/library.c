/* The guest kernel in the library that libkrun opens by its soname libkrunfw.so.5. libkrun maps the image into the guest where it
 * lies, so it is writable, private to the process, and a whole number of pages. e2e/scripts/kernel defines LOAD and ENTRY, the
 * guest-physical addresses of the image's first byte and of its first instruction, and compiles this beside kernel.bin. */
#include <stddef.h>
#include <stdint.h>

__asm__(".section .data, \"aw\"\n"
        ".balign 65536\n"
        "kernel_start:\n"
        ".incbin \"kernel.bin\"\n"
        ".balign 65536, 0\n"
        "kernel_end:\n"
        ".text\n");

extern char kernel_start[] __attribute__((visibility("hidden")));
extern char kernel_end[] __attribute__((visibility("hidden")));

/* The functions of libkrunfw.h, interface version 5. */
char *krunfw_get_kernel(uint64_t *load_address, uint64_t *entry_address, size_t *size)
{
	*load_address = LOAD;
	*entry_address = ENTRY;
	*size = (size_t)(kernel_end - kernel_start);
	return kernel_start;
}

int krunfw_get_version(void)
{
	return 5;
}
