/* A TCG plugin that counts what a guest executes, in the file "guest-instructions" of QEMU's working directory: three
 * numbers of 64 bits: instructions, those of the guest's kernel among them, and translated blocks.
 *
 * The declarations are the part of QEMU's plugin interface (version 1) that is used here; Debian has no header for it. */
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
enum { ADD_U64 = 0 };

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *block);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, int operation, void *counter, uint64_t value);
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*callback)(plugin_id, struct qemu_plugin_tb *));

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

static uint64_t *counters;

static void translated(plugin_id id, struct qemu_plugin_tb *block)
{
	uint64_t instructions = qemu_plugin_tb_n_insns(block);

	(void)id;
	qemu_plugin_register_vcpu_tb_exec_inline(block, ADD_U64, &counters[0], instructions);
	if (qemu_plugin_tb_vaddr(block) >> 63)
		qemu_plugin_register_vcpu_tb_exec_inline(block, ADD_U64, &counters[1], instructions);
	counters[2]++;
}

__attribute__((visibility("default"))) int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv)
{
	int file = open("guest-instructions", O_RDWR | O_CREAT | O_TRUNC, 0600);

	(void)info;
	(void)argc;
	(void)argv;
	if (file < 0 || ftruncate(file, 4096) != 0)
		return 1;
	counters = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	close(file);
	if (counters == MAP_FAILED)
		return 1;
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	return 0;
}
